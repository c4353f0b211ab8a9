"""The text of an experiment's report: the body of a page with places for ``string.Template``."""

__all__ = ["BODY"]

BODY = """<h1>Training methods compared: $data</h1>
<p class="lead">Each method trains a network from the same start. After training, each network is
quantized to every width with the same quantizer. Test accuracy in percent; seeds: $seeds.</p>

<h2>Results</h2>
$verdict

<h2>Accuracy</h2>
<p>(weight bits, activation bits); mean over the seeds ± standard deviation of the sample. Chance is 10 %.
Last column: computing time of the training, relative to plain training.</p>
$accuracy
$own
<p>A regime says which data are available when the network is quantized:</p>
$regimes
$bits

<h2>Procedure</h2>
<p>All networks of one seed share initial weights, the order of the images, their augmentation and the
first epochs; in the last $last of $epochs epochs each method minimises its own objective. Its strength rises
linearly over the first $warmup of these. QAT trains at a single width in these epochs. There is no
further training: weights use symmetric grids of least squared error, and activations one affine grid per
tensor. Calibration uses the first $calibration training images, without labels. The image has at least 8
bits. All of this also holds for the QAT networks. The settings of the gradient-l1 methods were chosen on
the last 5,000 training images, with networks that had not seen these. The settings of other methods follow
their papers, or the first-order relation between the methods, and were not tuned. No choice used the test
images.</p>
$methods

<h2>Gradients over training</h2>
<p>Norms are computed per tensor, in float and in evaluation mode on $probed training images, and summed.
In the third column, each l1 norm is multiplied by the quantization step of its tensor at 4 bits: half of
it is the largest first-order change of the loss at that width. In a layer before batch norm, larger weights
reduce the norm of the gradient without making the network more robust; the third column does not have this
problem.</p>
$norms

<h2>Validity of the first-order estimate</h2>
<p>All weights are moved at once by the same number of half steps (at 4 bits) of their tensor. Dashed:
the largest increase predicted by the l1 norm. Orange: the loss when each weight moves along the sign of its
gradient. Crosses: the loss when weights are rounded to 8, 7, 6, 5, 4 and 3 bits, placed at the largest
move that rounding can make; losses that decrease are not drawn. Where the orange line departs from the
dashed one, curvature dominates.</p>
$changes

<h2>Sensitivity of single tensors</h2>
<p>The increase of the loss on $probed training images when only one tensor is quantized to $alone_bits bits.
<code>.input</code> is the input of a layer, named after the first layer that receives it; the image has at
least 8 bits.</p>
$alone

$weights

<h2>Cost</h2>
<p>Median computing time of an epoch with the method, on one thread; other work on the same computer may
have slowed some epochs. Measuring norms is not counted.</p>
$time

<h2>Settings and versions</h2>
$settings
$environment
<footer>Written by <code>gradl1 experiment</code>. Method: Alizadeh et al., &ldquo;Gradient l1
Regularization for Quantization Robustness&rdquo;, ICLR 2020, arXiv 2002.07520.</footer>
"""
