"""The table of layer kinds: which layers are known, how their weights are laid out, and what keeps a layer float."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import octavo
from octavo import layers
from octavo.layers import KINDS, kind_of, why_not
from octavo.modules import QuantModule
from octavo.primitives import choose_scale
from octavo.primitives import quantize as codes_of
from octavo.recipe import DEFAULT_TARGETS, OPT_IN_TARGETS, Scheme


class Plain(nn.Linear):
    """A subclass that computes what its base class does."""

    def describe(self) -> str:
        return "plain"


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Linear(nn.Module):
    """Of the same name, from another home."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))


def test_every_target_of_a_recipe_is_a_kind() -> None:
    names = {kind.name for kind in KINDS}
    assert {*DEFAULT_TARGETS, *OPT_IN_TARGETS} == names | {"OutputHead"}


def test_the_table_at_the_head_of_the_file_has_every_kind() -> None:
    lines = (layers.__doc__ or "").splitlines()
    for kind in KINDS:
        family = re.sub(r"[123]d$", "1d", kind.name)
        names = [name for line in lines for name in line[:24].replace(",", " ").split()]
        assert any(name.startswith(family) for name in names), kind.name


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(3, 4), "Linear"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.MultiheadAttention(4, 2).out_proj, "Linear"),
        (nn.Conv1d(2, 4, 1), "Conv1d"),
        (nn.Conv2d(2, 4, 1), "Conv2d"),
        (nn.Conv3d(2, 4, 1), "Conv3d"),
        (nn.ConvTranspose1d(2, 4, 1), "ConvTranspose1d"),
        (nn.ConvTranspose2d(2, 4, 1), "ConvTranspose2d"),
        (nn.ConvTranspose3d(2, 4, 1), "ConvTranspose3d"),
        (nn.Embedding(4, 2), "Embedding"),
        (Plain(3, 4), "Linear"),
        (Doubling(3, 4), "Linear"),
        (Linear(), None),
        (nn.Bilinear(2, 2, 2), None),
        (nn.EmbeddingBag(4, 2), None),
        (nn.LSTM(2, 2), "LSTM"),
        (nn.RNN(2, 2, nonlinearity="relu"), "RNN"),
        (nn.GRUCell(2, 2), "GRUCell"),
        (nn.LayerNorm(4), None),
        (nn.Identity(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_kind_of(layer: nn.Module, kind: str | None) -> None:
    found = kind_of(layer)
    assert (found and found.name) == kind


def test_the_conv1d_of_transformers() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    found = kind_of(pytorch_utils.Conv1D(4, 3))
    assert found is not None and found.name == "Conv1D"


# -- how weights are laid out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_transposed_convolution_has_one_scale_for_each_output_channel(groups: int) -> None:
    layer = nn.ConvTranspose2d(2 * groups, 4 * groups, (2, 3), groups=groups)
    kind = kind_of(layer)
    assert kind is not None
    codes, scale = kind.quantize_param(layer, "weight", layer.weight.detach(), Scheme(), "weight")
    assert codes.shape == (4 * groups, 2, 2, 3)
    assert scale.shape == (4 * groups, 1)
    for channel in range(4 * groups):
        group, inside = divmod(channel, 4)
        filter_ = layer.weight.detach()[2 * group : 2 * group + 2, inside]  # the group's inputs, this output
        expected = choose_scale(filter_, "per_tensor")
        assert torch.equal(scale[channel], expected)
        assert torch.equal(codes[channel], codes_of(filter_, expected))


def test_conv1d_is_transposed() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(4, 6)  # weight [K=6, N=4]
    kind = kind_of(layer)
    assert kind is not None
    codes, scale = kind.quantize_param(layer, "weight", layer.weight.detach(), Scheme.of("w8a16", group_size=3), "w")
    assert (codes.shape, scale.shape) == ((4, 6), (4, 2))
    assert torch.equal(scale[1, 0], choose_scale(layer.weight.detach()[:3, 1], "per_tensor")[0])


def test_kinds_without_a_k_axis_stay_per_channel() -> None:
    grouped = Scheme.of("w8a16", group_size=4)
    assert [kind.name for kind in KINDS if kind.effective(grouped) == grouped] == [
        "Linear",
        "Conv1D",
        "MultiheadAttention",
        "LSTM",
        "GRU",
        "RNN",
        "LSTMCell",
        "GRUCell",
        "RNNCell",
    ]
    assert all(kind.effective(grouped) in (grouped, Scheme()) for kind in KINDS)


def test_the_parameters_of_attention() -> None:
    kind = kind_of(nn.MultiheadAttention(8, 2))
    assert kind is not None
    assert kind.params_of(nn.MultiheadAttention(8, 2)) == ("in_proj_weight",)
    assert kind.params_of(nn.MultiheadAttention(8, 2, kdim=4)) == ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def test_the_parameters_of_recurrent_layers() -> None:
    layer = nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3)
    kind = kind_of(layer)
    assert kind is not None
    assert set(kind.params_of(layer)) == {name for name, _ in layer.named_parameters() if name.startswith("weight")}
    assert len(kind.params_of(layer)) == 2 * 2 * 3


# -- what keeps a layer float -----------------------------------------------------------------------------------------


def instance_forward() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 4))


def low_precision() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 3).to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def integer() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_distributed_weights_stay_as_they_are(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def distributed(values: Tensor) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(values.detach(), mesh, [Shard(0)]))

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sharded = model[0]
    sharded.weight, sharded.bias = distributed(sharded.weight), distributed(sharded.bias)
    with pytest.warns(octavo.OctavoWarning, match="its weight is a DTensor"):
        report = octavo.quantize(model, "w8a16")
    assert [type(layer).__name__ for layer in model] == ["Linear", "QuantLinear"]
    (reason,) = [row.reason or "" for row in report.rows if row.name == "0.weight"]
    assert re.match("its weight is a DTensor, .*expected a plain one; quantize before the model is distributed", reason)


def holding(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def sparse(how: str) -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(getattr(layer.weight.detach(), how)())
    return layer


def buffered(layer: nn.Module, name: str) -> nn.Module:
    layer.register_buffer(name, torch.ones(4))
    return layer


class Scheduled(nn.Linear):
    scheme = "cosine"


def stack(**attributes: Any) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return holding(experts, **attributes)


TAKEN = ", which is something else of an int8 layer"
REASONS: list[tuple[Callable[[], nn.Module], str]] = [
    (instance_forward, "its forward was replaced on the instance"),
    (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "its weight is computed by a parametrization"),
    (lambda: parametrizations.spectral_norm(nn.Conv1d(3, 4, 1)), "its weight is computed by a parametrization"),
    (lambda: parametrizations.spectral_norm(parametrizations.weight_norm(nn.Conv1d(3, 4, 1))), "its weight is comp"),
    (lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 1), "bias"), "its bias is computed by a parametrization"),
    (old_weight_norm, "its weight is not a parameter but computed elsewhere"),
    (lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), "its weight is not a parameter but computed elsewhere"),
    (lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5), "its weight is not a parameter"),
    (lambda: prune.l1_unstructured(nn.Linear(3, 4), "bias", 0.5), "its bias is not a parameter"),
    (lambda: prune.l1_unstructured(nn.GRU(3, 4), "bias_ih_l0", 0.5), "its bias_ih_l0 is not a parameter"),
    (lambda: prune.l1_unstructured(nn.LSTMCell(3, 4), "bias_hh", 0.5), "its bias_hh is not a parameter"),
    (lambda: prune.l1_unstructured(nn.MultiheadAttention(4, 2), "in_proj_bias", 0.5), "its in_proj_bias is not a par"),
    (lambda: parametrizations.weight_norm(nn.GRU(3, 4), "bias_ih_l0"), "its bias_ih_l0 is computed by a parametriz"),
    (lambda: buffered(nn.Linear(3, 4), "weight_scale"), "Linear has a weight_scale" + TAKEN),
    (lambda: buffered(nn.Linear(3, 4), "weight_packed"), "Linear has a weight_packed" + TAKEN),
    (lambda: buffered(nn.Embedding(3, 4), "weight_scale"), "Embedding has a weight_scale" + TAKEN),
    (lambda: buffered(nn.GRU(3, 4), "weight_ih_l0_scale"), "GRU has a weight_ih_l0_scale" + TAKEN),
    (lambda: holding(nn.Linear(3, 4), weight_scale=0.5), "Linear has a weight_scale" + TAKEN),
    (lambda: holding(nn.Linear(3, 4), input_scale=nn.Parameter(torch.ones(1))), "Linear has a input_scale" + TAKEN),
    (lambda: holding(nn.Linear(3, 4), scheme="cosine"), "Linear has a scheme" + TAKEN),
    (lambda: holding(nn.Linear(3, 4), fake=True), "Linear has a fake" + TAKEN),
    (lambda: holding(nn.Linear(3, 4), made_of=1), "Linear has a made_of" + TAKEN),
    (lambda: holding(nn.Conv1d(3, 4, 1), note="mine"), "Conv1d has a note" + TAKEN),
    (lambda: holding(nn.Conv1d(3, 4, 1), codes=nn.Linear(3, 4)), "Conv1d has a codes" + TAKEN),
    (lambda: holding(nn.GRUCell(3, 4), mode="fast"), "GRUCell has a mode" + TAKEN),
    (lambda: stack(spec="mine"), "MixtralExperts has a spec" + TAKEN),
    (lambda: Scheduled(3, 4), "Scheduled has a scheme" + TAKEN),
    (lambda: sparse("to_sparse_coo"), r"its weight is stored as torch.sparse_coo, expected a dense one; .to_dense\(\)"),
    (lambda: sparse("to_sparse_csr"), "its weight is stored as torch.sparse_csr, expected a dense one"),
    (lambda: nn.Embedding(4, 3, max_norm=1.0), "max_norm renormalizes the float table at every lookup"),
    (low_precision, "its weight is torch.float8_e4m3fn, already a low-precision type"),
    (lambda: nn.Linear(3, 4, dtype=torch.complex64), "its weight is torch.complex64, and int8 codes have no imaginary"),
    (integer, "its weight is torch.int8, already a low-precision type"),
]


@pytest.mark.parametrize(("make", "reason"), REASONS, ids=[reason[:40] for _, reason in REASONS])
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning", "ignore:Sparse CSR tensor support is in beta")
def test_why_not(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    kind = kind_of(layer)
    assert kind is not None
    assert re.match(reason, why_not(layer, kind) or "")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 4),
        nn.Linear(3, 4, bias=False),
        Plain(3, 4),
        nn.Conv2d(2, 4, 3),
        nn.ConvTranspose1d(2, 4, 3),
        nn.Embedding(4, 3, padding_idx=0, scale_grad_by_freq=True),
        holding(nn.Embedding(4, 3), bias=0.5, input_scale=2.0),  # neither of which an int8 embedding has
        stack(),
        nn.MultiheadAttention(4, 2),
        nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3),
        nn.Linear(3, 4, dtype=torch.float64),
        parametrize.remove_parametrizations(parametrizations.weight_norm(nn.Linear(3, 4)), "weight"),
        parametrizations.weight_norm(nn.Conv1d(2, 4, 3)),
        parametrizations.weight_norm(nn.ConvTranspose2d(2, 4, 3), dim=1),
    ],
    ids=lambda layer: repr(layer).splitlines()[0],
)
def test_nothing_is_against(layer: nn.Module) -> None:
    kind = kind_of(layer)
    assert kind is not None
    assert why_not(layer, kind) is None


@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        (lambda: nn.Linear(8, 8), "w8a16"),
        (lambda: nn.Linear(8, 8), "w8a8"),
        (lambda: nn.Linear(8, 8), "w8a8-static"),
        (lambda: Doubling(8, 8), "w8a16"),
        (lambda: nn.Conv2d(8, 8, 1), "w8a16"),
        (lambda: nn.ConvTranspose1d(8, 8, 1), "w8a16"),
        (lambda: nn.Embedding(8, 8), "w8a16"),
        (lambda: nn.MultiheadAttention(8, 2), "w8a16"),
        (lambda: nn.LSTM(8, 8), "w8a8"),
        (lambda: nn.GRUCell(8, 8), "w8a16"),
        (stack, "w8a8"),
    ],
)
def test_whatever_an_int8_layer_adds_keeps_one_that_has_it_float(make: Callable[[], nn.Module], scheme: str) -> None:
    model = nn.Sequential(make())
    before = names(model[0])
    stats = octavo.calibrate(model, [torch.randn(4, 8)]) if scheme == "w8a8-static" else None
    octavo.quantize(model, scheme, include=["0"], stats=stats)
    assert isinstance(model[0], QuantModule)
    added = names(model[0]) - before
    assert {"scheme", "replaces"} <= added
    for name in added:
        layer = holding(make(), **{name: "mine"})
        kind = kind_of(layer)
        assert kind is not None and f"has a {name}{TAKEN}" in (why_not(layer, kind) or "")


def names(layer: nn.Module) -> set[str]:
    return {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
