#include "kernels.h"
namespace octavo { extern const Kernels scalar_kernels={"scalar"}; extern const Kernels avx2_kernels={"avx2"}; }
