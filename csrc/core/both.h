// Marks what compiles for the host and for a device.
#pragma once

#if defined(__CUDACC__)
#define SALTIRE_BOTH __host__ __device__ __forceinline__
#else
#define SALTIRE_BOTH inline
#endif
