"""Which gated MLPs are recognized, by what they do; and that their stand-ins do the same."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octavo
from octavo import ops
from octavo.fused.gated import FusedGatedMLP, fused_gated_mlps
from octavo.ops import dispatch, eager, native
from tests.tiny_models import llama

pytest.importorskip("transformers")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
H, I = 24, 40  # noqa: E741  the field's names

RECOGNIZED = {
    "llama.LlamaMLP": "silu", "qwen2.Qwen2MLP": "silu", "qwen3.Qwen3MLP": "silu", "mistral.MistralMLP": "silu",
    "granite.GraniteMLP": "silu", "olmo2.Olmo2MLP": "silu", "smollm3.SmolLM3MLP": "silu",
    "deepseek_v3.DeepseekV3MLP": "silu",
    "phi3.Phi3MLP": "silu", "glm4.Glm4MLP": "silu",  # one layer for gate and up
    "gemma.GemmaMLP": "gelu_tanh", "gemma2.Gemma2MLP": "gelu_tanh",
}  # fmt: skip
every_class = pytest.mark.parametrize("name", RECOGNIZED)


@pytest.fixture(autouse=True)
def _few_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels to serve these small MLPs."""
    monkeypatch.setattr(eager, "_LEAST_TO_GATE", 1)


def mlp_of(name: str) -> Any:
    """An MLP of transformers' class `name`."""
    folder, _, cls = name.partition(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = next(
        value for key, value in vars(module).items() if key == f"{cls.removesuffix('MLP')}Config" and value is not None
    )()
    config.hidden_size, config.intermediate_size = H, I
    return getattr(module, cls)(config).eval()


def fused(mlp: nn.Module) -> FusedGatedMLP:
    return fused_gated_mlps(nn.Sequential(mlp))["0"]


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows [..., H], the last of them large."""
    return (torch.randn(shape) * torch.logspace(-2, 2, shape[-2]).unsqueeze(1)).to(dtype)


def served() -> bool:
    """Whether CPUs have a kernel here."""
    with torch.no_grad():
        return ops.fuses_gates(torch.ones(8192))


def assert_close(y: Tensor, expected: Tensor) -> None:
    """As far as both may be off who compute in fp32 and round to their dtype: act(gate), its product, sums of these."""
    limits = torch.finfo(y.dtype)
    torch.testing.assert_close(y, expected, rtol=16 * limits.eps, atol=8 * limits.eps * float(expected.abs().max()))


# -- the same ---------------------------------------------------------------------------------------------------------


@every_class
def test_the_same_but_for_rounding(name: str) -> None:
    for dtype in DTYPES:
        mlp = mlp_of(name).to(dtype)
        x = rows(3, 7, H, dtype=dtype)
        before = x.clone()
        with torch.no_grad():
            assert_close(fused(mlp)(x), mlp(x))
        assert torch.equal(x, before)


@every_class
def test_the_same_bits_where_a_gradient_may_be_wanted(name: str) -> None:
    mlp = mlp_of(name)
    x, up = rows(7, H).requires_grad_(), torch.randn(7, H)
    ours, theirs = fused(mlp)(x), mlp(x)
    assert torch.equal(ours, theirs)
    leaves = (x, *mlp.parameters())
    for grad, expected in zip(
        torch.autograd.grad(ours, leaves, up), torch.autograd.grad(theirs, leaves, up), strict=True
    ):
        assert torch.equal(grad, expected)


@every_class
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_with_int8_layers(name: str, scheme: str) -> None:
    model = nn.Sequential(mlp_of(name).bfloat16())
    octavo.quantize(model, scheme)
    assert isinstance(model[0], FusedGatedMLP)
    x = rows(3, 7, H, dtype=torch.bfloat16)
    with torch.no_grad():
        y = model(x)
    with torch.enable_grad():  # the module's own forward
        torch.testing.assert_close(y, model(x), rtol=0.02, atol=0.02 * float(y.abs().max()))


@every_class
def test_which_activation(name: str) -> None:
    assert f"fused: {RECOGNIZED[name]}" in repr(fused(mlp_of(name)))


@every_class
def test_under_autocast(name: str) -> None:
    mlp, x = mlp_of(name), rows(7, H)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(mlp)(x), mlp(x)
    assert y.dtype == expected.dtype
    assert_close(y.bfloat16(), expected.bfloat16())


@pytest.mark.gpu
@every_class
def test_on_a_gpu_but_for_rounding(name: str) -> None:
    for dtype in DTYPES:
        mlp = mlp_of(name).to(dtype).cuda()
        for x in (rows(3, 7, H, dtype=dtype).cuda(), rows(1, H, dtype=dtype).cuda()):
            with torch.no_grad():
                assert_close(fused(mlp)(x), mlp(x))


# -- what is asked of whom --------------------------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """Llama's, to be varied."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(H, I), nn.Linear(I, H), nn.Linear(H, I)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.gated(self.w1(x), self.w3(x)))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up


def calls_of_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations that `ops.gated` is called for from now on."""
    called: list[str] = []
    real = ops.gated

    def note(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        called.append(activation)
        return real(gate, up, activation)

    monkeypatch.setattr(ops, "gated", note)
    return called


def test_the_kernel_serves_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of_kernels(monkeypatch)
    mlp, x = fused(GatedMLP().eval()), rows(3, H)
    expected = mlp(x)
    assert not called, "a gradient may be wanted"
    with torch.no_grad():
        mlp(x.double().float())
        assert called == ["silu"] * served()
        called.clear()
        assert_close(torch.func.vmap(mlp)(x.view(3, 1, H)).view(3, H), expected)
        assert_close(mlp.double()(x.double()).float(), expected)
    assert not called


def test_a_token_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    called = calls_of_kernels(monkeypatch)
    mlp = fused(GatedMLP().eval())
    with torch.no_grad():
        mlp(rows(1, H))
        assert not called
        mlp(rows(8192 // H + 1, H))
    assert called == ["silu"] * served()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_an_activation_that_is_listened_to_is_called(register: str) -> None:
    mlp = GatedMLP(nn.SiLU()).eval()
    stand_in, heard = fused(mlp), []
    x = rows(3, H)
    with torch.no_grad():
        expected = mlp(x)
        getattr(mlp.activation, register)(lambda *_: heard.append(True))
        assert torch.equal(stand_in(x), expected) and heard == [True]


def test_global_hooks_hear_the_activation() -> None:
    stand_in, heard = fused(GatedMLP(nn.SiLU()).eval()), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module)))
    try:
        with torch.no_grad():
            stand_in(rows(3, H))
    finally:
        handle.remove()
    assert nn.SiLU in heard


class Scaled(GatedMLP):
    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__(activation)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.gated(self.w1(x), self.w3(x)) * self.scale)


CHANGES = [(F.silu, "activation", F.relu), (nn.SiLU(), "activation", nn.ReLU().eval()), (F.silu, "scale", 2.0)]


@pytest.mark.parametrize(("silu", "name", "value"), CHANGES, ids=["function", "module", "number"])
def test_what_is_changed_afterwards_counts(silu: Any, name: str, value: Any) -> None:
    mlp, x = Scaled(silu).eval(), rows(5, H)
    new = fused(mlp)
    for each in (new, mlp):
        setattr(each, name, value)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(new).train().eval()(x), mlp(x))


def test_quantizing_changes_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    octavo.quantize(model, "w8a8")
    asked: list[int] = []
    monkeypatch.setattr(ops, "fuses_gates", lambda x: asked.append(1) is not None)
    with torch.no_grad():
        copy.deepcopy(model).half().float()(torch.arange(4)[None])
    assert len(asked) == len(model.model.layers)


class WithDropout(GatedMLP):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.dropout(super().gated(gate, up))


def test_dropout_drops_in_training() -> None:
    stand_in, x = fused(WithDropout(0.999).eval()), rows(3, H)
    with torch.no_grad():
        whole = stand_in(x)
        stand_in.dropout.train()
        dropped = stand_in(x)
    assert not torch.allclose(whole, dropped, rtol=0.1)


def test_hooks_on_its_layers_run() -> None:
    mlp, heard = GatedMLP().eval(), []
    for layer in (mlp.w1, mlp.w2, mlp.w3):
        layer.register_forward_hook(lambda module, *_: heard.append(module))
    with torch.no_grad():
        fused(mlp)(rows(3, H))
    assert heard == [mlp.w1, mlp.w3, mlp.w2]


# -- look-alikes ------------------------------------------------------------------------------------------------------


class UpFirst(GatedMLP):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, 2 * I), None

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.w1(x).chunk(2, -1)
        return self.w2(self.gated(gate, up))


def test_what_the_look_alikes_vary_is_recognized() -> None:
    for mlp in (
        GatedMLP(),
        GatedMLP(nn.SiLU()),
        GatedMLP(nn.SiLU(inplace=True)),
        WithDropout(0.5),
        UpFirst(),
        SharesALayer(),
    ):
        x = rows(5, H)
        with torch.no_grad():
            assert_close(fused(mlp.eval())(x), mlp(x))
    assert "gelu_tanh" in repr(fused(GatedMLP(nn.GELU("tanh"))))


class Clamped(GatedMLP):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated(gate.clamp(max=7), up.clamp(-7, 7))


class UpPlusOne(GatedMLP):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated(gate, up + 1)


class InFloat32(GatedMLP):
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated(gate.float(), up.float()).to(gate.dtype)


class Interleaved(UpFirst):
    def forward(self, x: Tensor) -> Tensor:
        both = self.w1(x)
        return self.w2(self.gated(both[..., ::2], both[..., 1::2]))


class ReadsAWeight(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.w1.weight.dtype))


class ScalesItsOutput(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class ScalesItsInput(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


class Residual(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ReturnsMore(GatedMLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class SharesALayer(GatedMLP):
    def __init__(self) -> None:
        super().__init__()
        self.w3 = self.w1


class Counting(GatedMLP):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class ZeroesItsInput(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.zero_()
        return y


class OptionalMask(GatedMLP):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class WithoutSignature(GatedMLP):
    forward = max  # type: ignore[assignment]


class Failing(GatedMLP):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("not before it is set up")


def with_hook(register: str) -> GatedMLP:
    mlp = GatedMLP()
    getattr(mlp, register)(lambda *_: None)
    return mlp


def with_parameter() -> GatedMLP:
    mlp = GatedMLP()
    mlp.scale = nn.Parameter(torch.ones(H))
    return mlp


def with_forward_of_its_own() -> GatedMLP:
    mlp = GatedMLP()
    mlp.forward = lambda x: GatedMLP.forward(mlp, x)  # type: ignore[method-assign]
    return mlp


VARIED = (
    Clamped, UpPlusOne, InFloat32, Interleaved, ReadsAWeight, ScalesItsOutput, ScalesItsInput, Residual, ReturnsMore,
    Counting, ZeroesItsInput, OptionalMask, Plain, WithoutSignature, Failing,
)  # fmt: skip

LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: cls for cls in VARIED},
    **{
        f"gated by {activation.__name__}": partial(GatedMLP, activation)
        for activation in (F.relu, F.gelu, torch.sigmoid, F.mish, F.elu)
    },
    "an activation with a parameter": lambda: GatedMLP(nn.PReLU()),
    "sequential": lambda: nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H)),
    "forward hook": lambda: with_hook("register_forward_hook"),
    "forward pre-hook": lambda: with_hook("register_forward_pre_hook"),
    "backward hook": lambda: with_hook("register_full_backward_hook"),
    "parameter": with_parameter,
    "forward of the instance": with_forward_of_its_own,
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_left_alone(name: str) -> None:
    mlp = LOOK_ALIKES[name]()
    before = repr(vars(mlp))
    assert not fused_gated_mlps(nn.Sequential(mlp))
    assert repr(vars(mlp)) == before


# -- a stand-in is what the module was ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_it_has_what_the_module_had(training: bool) -> None:
    mlp = mlp_of("llama.LlamaMLP").train(training)
    found = fused(mlp)
    assert list(found.named_modules())[1:] == list(mlp.named_modules())[1:]
    assert found.state_dict().keys() == mlp.state_dict().keys()
    assert (found.training, found.config, found.hidden_size) == (training, mlp.config, H)
    assert mlp.act_fn.training == training


def test_what_asks_for_the_class_finds_it() -> None:
    mlp = mlp_of("llama.LlamaMLP")
    found = fused(mlp)
    assert isinstance(found, type(mlp)) and type(found).__name__ == "FusedLlamaMLP"
    assert type(fused(mlp_of("llama.LlamaMLP"))) is type(found)


def test_its_argument_may_be_named() -> None:
    mlp = mlp_of("phi3.Phi3MLP")
    x = rows(5, H)
    with torch.no_grad():
        assert_close(fused(mlp)(hidden_states=x), mlp(hidden_states=x))


def test_on_meta_and_without_a_trace() -> None:
    with torch.device("meta"):
        mlp = GatedMLP()
        random = torch.get_rng_state()
        found = fused(mlp)
    assert found.w1 is mlp.w1 and found.w1.weight.is_meta
    assert torch.equal(random, torch.get_rng_state())


def test_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    assert isinstance(fused(GatedMLP()), FusedGatedMLP)


@pytest.mark.parametrize("name", ["llama.LlamaMLP", "phi3.Phi3MLP"])
def test_copies_and_pickles(name: str) -> None:
    found, x = fused(mlp_of(name)), rows(5, H)
    with torch.no_grad():
        for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert torch.equal(twin(x), found(x)) and repr(twin) == repr(found)
            assert next(twin.parameters()) is not next(found.parameters())


@pytest.mark.parametrize("name", ["llama.LlamaMLP", "phi3.Phi3MLP"])
def test_compiled_and_exported(name: str) -> None:
    found, x = fused(mlp_of(name)), rows(5, H)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), found(x))
        exported = torch.export.export(nn.Sequential(found), (x,)).module()
        assert_close(exported(x), found(x))


# -- in a model -------------------------------------------------------------------------------------------------------


def test_what_is_ignored_stays() -> None:
    model = nn.ModuleDict({"a": GatedMLP(), "b": GatedMLP()})
    octavo.quantize(model, "w8a16", ignore=["b"])
    assert isinstance(model["a"], FusedGatedMLP) and type(model["b"]) is GatedMLP


def test_without_kernels_the_module_s_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls_of_kernels(monkeypatch)
    monkeypatch.setattr(dispatch, "native_kernels", native.Native(None, "none"))
    mlp, x = GatedMLP().eval(), rows(5, H)
    with torch.no_grad():
        assert torch.equal(fused(mlp)(x), mlp(x)) and not called
