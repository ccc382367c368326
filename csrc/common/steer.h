// What the integers in steer's tables mean; fastsae/_steer_codes.py has the same numbers.
#pragma once

namespace fastsae {

enum SteerOpcode : int {
  kSteerEnd = 0,
  kSteerClamp = 1,
  kSteerMinClamp = 2,
  kSteerClampIfActive = 3,
  kSteerScale = 4,
  kSteerAdd = 5,
  kSteerProbe = 6,
};
enum SteerFlag : int { kSteerRaw = 1, kSteerSigned = 2, kSteerMember = 4 };
enum SteerNorm : int { kNormNone = 0, kNormLayer = 1, kNormConstant = 2 };
enum SteerParam : int {
  kSteerBias = 0,
  kSteerTheta = 1,
  kSteerGain = 2,
  kSteerOffset = 3,
  kSteerValue = 4,
  kSteerTau = 5,
  kSteerParams = 6,
};
enum SteerCode : int { kSteerOp = 0, kSteerFlags = 1, kSteerGate = 2, kSteerCodes = 3 };

#if defined(__CUDACC__)
#define FASTSAE_HOST_DEVICE __host__ __device__
#else
#define FASTSAE_HOST_DEVICE
#endif

// The latent's activation from p = <enc, u>.
template <class A>
FASTSAE_HOST_DEVICE inline A steer_activation(A p, const A* param, int flags, bool member) {
  if (!(p + param[kSteerBias] > param[kSteerTheta])) return A(0);
  if ((flags & kSteerMember) && !member) return A(0);
  const A f = param[kSteerGain] * p + param[kSteerOffset];
  return (flags & kSteerSigned) || f > A(0) ? f : A(0);
}

// delta of one entry, its gate left aside.
template <class A>
FASTSAE_HOST_DEVICE inline A steer_delta(int opcode, A f, A v) {
  switch (opcode) {
    case kSteerClamp:
      return v - f;
    case kSteerMinClamp:
      return v - f > A(0) ? v - f : A(0);
    case kSteerClampIfActive:
      return f > A(0) ? v - f : A(0);
    case kSteerScale:
      return (v - A(1)) * f;
    case kSteerAdd:
      return v;
    default:
      return A(0);
  }
}

}  // namespace fastsae
