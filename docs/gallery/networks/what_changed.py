"""
What did DCNv1 and DCNv2 change in what a node sees?
====================================================

Three questions about one node, asked of three networks: where does it sample, which pixels move it, and
which region is enough for it? The rows are those of Figure 1 of the DCNv2 paper; `python -m dcn_np see`
draws the same sheet for images and networks of your own.
"""

import matplotlib.pyplot as plt
import numpy

from dcn_np import analysis
from dcn_np.analysis import plot
from dcn_np.commands.demo_digits import TrainedDigits

trained = TrainedDigits()
images = trained.digits.images[:, None] / numpy.float32(255)


def view(variant, image):
    """Look at the node over the middle."""
    network = trained.network(variant)
    of_node = analysis.of_layers(network.stages(), analysis.Node("conv4.relu", position=(3, 3)))
    return analysis.view_node(of_node, image, epsilon=0.02)


figure, axes = plt.subplots(3, 3, figsize=(8, 7.4), layout="compressed", sharex=True, sharey=True)
plot.sheet(axes, [view(variant, images[8]) for variant in trained.states], list(trained.states))

# %%
# One digit is an anecdote. Over the first of each digit, with the spread among them: samples, their
# distance from the node; field and spread, of the receptive field; and the region within an error of 0.02.
# A sample that went far need not count for much, as its colour above tells: that is why the field widens
# less than the samples.

chosen = numpy.concatenate([numpy.flatnonzero(trained.digits.labels == label)[:1] for label in range(10)])
print(f"mean ± standard deviation over {len(chosen)} digits")
print(f"{'network':<8}{'samples from the node, px':>27}{'field, px':>15}{'spread, px':>14}{'region, %':>15}")
for variant in trained.states:
    views = [view(variant, images[index]) for index in chosen]
    numbers = [
        (
            numpy.linalg.norm(found.positions - found.place, axis=1).mean(),
            found.field.size(),
            found.field.spread(),
            100 * found.region.area,
        )
        for found in views
    ]
    mean, spread = numpy.mean(numbers, axis=0), numpy.std(numbers, axis=0)
    cells = [f"{a:.1f} ± {b:.1f}" for a, b in zip(mean, spread, strict=True)]
    print(f"{variant:<8}{cells[0]:>27}{cells[1]:>15}{cells[2]:>14}{cells[3]:>15}")
    assert max(found.region.error for found in views) <= 0.02
