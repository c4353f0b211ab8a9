"""The text of the demo's report: the body of a page with places for ``string.Template``."""

__all__ = ["BODY", "TITLE"]

TITLE = "gradl1_fast: one network, any bit width"

BODY = """<h1>One network, any bit width</h1>
<p class="lead">Twin networks, trained on handwritten digits with and without the
gradient-l1 penalty, then quantized on demand.</p>

<h2>What was found</h2>
$verdict

<h2>What was done</h2>
<p>Quantizing a network rounds each weight and each activation to one of a few values: at 8 bits
256, at 3 bits 8. No value moves by more than half a step unless it is clipped, so to first order
the loss changes by at most half a step times the sum of the absolute values of its gradient: the
gradient's <em>l1 norm</em>. Training that keeps this sum small should leave a network that survives
rounding at <em>any</em> width, without having seen one.</p>
<p>Each pair starts from the same weights and sees the same batches for the same number of epochs,
$epochs. In the last $penalty_epochs the penalised twin adds $coefficient times the l1 norms, each
multiplied by its tensor's step at 4 bits, to its loss. Nothing was trained after quantization, and
each network's one set of weights serves all widths.</p>

<h2>Accuracy at every width</h2>
<p>Each cell is a pair of widths: weights down, activations across. Both maps on the left share one
colour scale, so equal colours mean equal accuracy. On the right, purple cells are widths at which
the penalised network is better, orange ones those at which it is worse. The numbers are
means over the pairs.</p>
$grids

<h2>How much it varies</h2>
<p>Weights and activations at the same width; $averaged. Lines are means, bands reach from the worst
to the best; where the bands overlap the difference is not certain. Chance is 10 %.</p>
$accuracy
$accuracy_table

<h2>What it costs</h2>
<p>Gradients of gradients are costly: ordinary double backprop (<code>torch.autograd.grad</code>
with <code>create_graph=True</code>, on the unconverted network) is compared with this library,
which computes the same penalty (here to within $disagreement of it, relative). Only the epochs with
the penalty pay this price. The step that the demo trains with, <code>scale="step"</code>, also
measures the range of each tensor. In small networks the overhead of each operation counts; in
larger ones the arithmetic does.</p>
$speed
$speed_tables

<h2>Limits of this demo</h2>
<p>Digits of 8x8 pixels are easy, the test set is small (one image is 0.17 %), and the coefficient
and the number of epochs were chosen by looking at this data set. Depthwise-separable networks, as
used on phones, are known to suffer most from quantization; ordinary convolutional networks lose
less on digits, and have less to gain. Times are of this computer and this run.</p>

<h2>Settings and versions</h2>
$settings
$environment
<footer>Written by <code>gradl1 demo</code> in $minutes minutes. All numbers are in
<code>results.json</code>. Method: Alizadeh et al., &ldquo;Gradient l1 Regularization for
Quantization Robustness&rdquo;, ICLR 2020, arXiv 2002.07520.</footer>
"""
