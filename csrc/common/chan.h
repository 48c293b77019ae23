// Merging sample statistics kept as partials (count, mean, M2), for host and device.
#pragma once

#include "host_device.h"

namespace pk {

template <class Real>
struct Moments {
  Real count = 0, mean = 0, m2 = 0;

  // The update of Chan, Golub and LeVeque, which has no difference of large sums however large the mean is. Adds the
  // statistics of n elements.
  PK_HOST_DEVICE void merge(Real n, Real mean_n, Real m2_n) {
    if (n == 0) return;
    const Real total = count + n, delta = mean_n - mean;
    mean += delta * (n / total);
    m2 += m2_n + delta * (delta * (count * (n / total)));  // count is 0 for the first: its mean adds nothing
    count = total;
  }
};

}  // namespace pk
