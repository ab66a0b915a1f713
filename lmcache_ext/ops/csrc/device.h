// Marks functions that run on a host and, compiled by nvcc, on a GPU too: the tests run these on the host.

#pragma once

#if defined(__CUDACC__)
#define KVX_DEVICE __host__ __device__ inline
#else
#define KVX_DEVICE inline
#endif
