"""The text of an experiment's report: the body of a page with places for ``string.Template``."""

__all__ = ["BODY"]

BODY = """<h1>Training methods compared: $data</h1>
<p class="lead">One network by each method from the same start, then quantized to every width after
training, by the same quantizer. Test accuracy in percent; seeds: $seeds.</p>

<h2>What was found</h2>
$verdict

<h2>Accuracy</h2>
<p>(weight bits, activation bits); mean over the seeds ± standard deviation of the sample. Chance is 10 %.
Last column: computing time of the training over that of plain training.</p>
$accuracy
$own
<p>A regime says what is known when the network is quantized:</p>
$regimes
$bits

<h2>What was done</h2>
<p>All networks of one seed share initial weights, the order of the images, their augmentation and the
first epochs; in the last $last of $epochs epochs each method minimises its own objective. Its strength rises
linearly over the first $warmup of these. QAT trains at its one width in these epochs. Then nothing
is trained: weights get symmetric grids of least squared error; activations one affine grid a tensor. Where
images are used to calibrate they are the first $calibration of training, without labels. The image has 8
bits at least. All of this holds for the QAT networks too. Settings of the
gradient-l1 methods were chosen on the last 5,000 training images, with networks that had not seen these;
those of other methods follow their papers, or the first-order relation between the methods, and were not
tuned. The test images chose nothing.</p>
$methods

<h2>Gradients over training</h2>
<p>Each norm is taken tensor by tensor, in float and in evaluation mode on $probed training images, and
summed. The third column has each l1 norm times the quantization step of its tensor at 4 bits: half of
it is the worst first-order change of the loss at that width. In a layer before batch norm larger weights
make the gradient's norm smaller without helping against quantization; the third column does not have
this flaw.</p>
$norms

<h2>How far the first order goes</h2>
<p>All weights are moved at once by the same number of half steps (at 4 bits) of their tensor. Dashed:
what the l1 norm foretells as the worst. Orange: the loss when each weight moves along the sign of its
gradient. Crosses: the loss when weights are rounded to 8, 7, 6, 5, 4 and 3 bits, placed at the largest
move that rounding can make; a loss that falls is not drawn. Where the orange line leaves the dashed one,
curvature has taken over.</p>
$changes

<h2>What holds a network back</h2>
<p>The rise of the loss on $probed training images when one tensor alone is quantized to $alone_bits bits.
<code>.input</code> is the tensor that a layer is given, named after the first such layer; the image has 8
bits at least.</p>
$alone

<h2>What it costs</h2>
<p>Median computing time of an epoch in which the method is at work, on one thread; other work on the
same computer may have slowed some of them. Measuring norms is not counted.</p>
$time

<h2>Settings and versions</h2>
$settings
$environment
<footer>Written by <code>gradl1 experiment</code>. Method: Alizadeh et al., &ldquo;Gradient l1
Regularization for Quantization Robustness&rdquo;, ICLR 2020, arXiv 2002.07520.</footer>
"""
