// Merging sample statistics kept as partials (count, mean, M2), for host and device.
#pragma once

#include "host_device.h"

namespace pk {

template <class Real>
struct Moments {
  Real count = 0, mean = 0, m2 = 0;

  // Chan, Golub and LeVeque: no difference of large sums, whatever the mean is to the deviation.
  PK_HOST_DEVICE void merge(Real n, Real mean_n, Real m2_n) {
    if (n == 0) return;
    const Real total = count + n, delta = mean_n - mean;
    mean += delta * (n / total);
    m2 += m2_n + delta * (delta * (count * (n / total)));  // 0 for the first, whatever its mean
    count = total;
  }
};

}  // namespace pk
