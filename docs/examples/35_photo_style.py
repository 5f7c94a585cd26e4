"""
Swap the style of two photographs
=================================

You get one photograph in the colours of another: the step that style transfer networks call adaptive instance
normalization (AdaIN). This page is for those who work with images as arrays; no network is needed to see it work.

In short: instance norm takes each photograph's own mean and standard deviation away, one for each colour, and
``denormalize`` puts those of the other photograph in their place.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

import anynorm

# %%
# The two sample images of scikit-learn have the same size. Together they are a batch of two samples with the channels
# last: shape (N, H, W, C).

photos = np.stack(load_sample_images().images).astype(np.float32) / 255
print(photos.shape)

# %%
# Normalize each colour of each photograph over its own pixels, and keep the statistics. They have shape (N, C). With
# ``eps=0`` the way back is exact; a photograph of one plain colour would need an ``eps``.

content, style = anynorm.instance_norm(photos, channel_axis=-1, eps=0, return_moments=True)
for name, mean, std in zip(("temple", "flower"), style.mean, style.std()):
    print(f"{name}: mean of red, green, blue {mean.round(3)}, standard deviation {std.round(3)}")

# %%
# Swap the statistics, and go the way back. ``axis`` names the axes that shared a mean: height and width.

other = anynorm.Moments(style.mean[::-1], style.var[::-1], style.count)
swapped = anynorm.denormalize(content, axis=(1, 2), moments=other, eps=0)

# %%
# The check: each result has the mean and the standard deviation of the other photograph, as NumPy computes them in
# float64.

wide, numbers = swapped.astype(np.float64), photos.astype(np.float64)[::-1]
error = max(
    np.abs(wide.mean(axis=(1, 2)) - numbers.mean(axis=(1, 2))).max(),
    np.abs(wide.std(axis=(1, 2)) - numbers.std(axis=(1, 2))).max(),
)
print(f"largest error of a mean or a standard deviation: {error:.0e}")
assert error < 1e-6

# %%
# Halfway there is a mix of the two states. Colours that leave the range from 0 to 1 are cut off when they are drawn.

figure, places = plt.subplots(2, 3, figsize=(9, 4.4), layout="constrained")
for row, (photo, result) in enumerate(zip(photos, swapped)):
    for place, share in zip(places[row], (0.0, 0.5, 1.0)):
        place.imshow(np.clip((1 - share) * photo + share * result, 0, 1))
        place.set_title(f"{share:.0%} of the other's style", fontsize=9)
        place.axis("off")
plt.show()
