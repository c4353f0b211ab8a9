"""The text of the demo's report: the body of a page with places for ``string.Template``."""

__all__ = ["BODY", "TITLE"]

TITLE = "gradl1_fast: one network, any bit width"

BODY = """<h1>One network, any bit width</h1>
<p class="lead">Twin networks, trained on handwritten digits with and without the
gradient-l1 penalty, then quantized on demand.</p>

<h2>Results</h2>
$verdict

<h2>Procedure</h2>
<p>Quantization rounds each weight and each activation to one of a few values: 256 at 8 bits, 8 at
3 bits. No value moves by more than half a step unless it is clipped. To first order, the loss
therefore changes by at most half a step times the <em>l1 norm</em> of its gradient, the sum of the
absolute values. Training that keeps this norm small should give a network that is robust to
rounding at <em>any</em> width, without training at one.</p>
<p>Each pair starts from the same weights and sees the same batches for the same number of epochs,
$epochs. In the last $penalty_epochs the penalised twin adds $coefficient times the l1 norms, each
multiplied by the step of its tensor at 4 bits, to the loss. Nothing was trained after quantization;
each network uses a single set of weights for all widths.</p>

<h2>Accuracy at every width</h2>
<p>Each cell is a pair of widths: weights down, activations across. Both maps on the left share one
colour scale, so equal colours mean equal accuracy. On the right, purple cells are widths at which
the penalised network is better, orange ones those at which it is worse. The numbers are
means over the pairs.</p>
$grids

<h2>Variation</h2>
<p>Weights and activations at the same width; $averaged. Lines are means, and bands reach from the worst
to the best; where bands overlap, the difference is not certain. Chance is 10 %.</p>
$accuracy
$accuracy_table

<h2>Cost</h2>
<p>Double backprop is expensive. Ordinary double backprop (<code>torch.autograd.grad</code> with
<code>create_graph=True</code>, on the unconverted network) is compared with this library, which
computes the same penalty (here to a relative difference of $disagreement). Only the epochs with the
penalty have this cost. With <code>scale="step"</code>, as in the demo, a step also measures the
range of each tensor. In small networks the overhead of each operation dominates, in larger ones the
arithmetic.</p>
$speed
$speed_tables

<h2>Limits of this demo</h2>
<p>Digits of 8x8 pixels are easy, the test set is small (one image is 0.17 %), and the coefficient
and the number of epochs were chosen by looking at this data set. Depthwise-separable networks, as
used on phones, are known to suffer most from quantization; ordinary convolutional networks lose
less on digits and have less to gain. The times are from this computer and this run.</p>

<h2>Settings and versions</h2>
$settings
$environment
<footer>Written by <code>gradl1 demo</code> in $minutes minutes. All numbers are in
<code>results.json</code>. Method: Alizadeh et al., &ldquo;Gradient l1 Regularization for
Quantization Robustness&rdquo;, ICLR 2020, arXiv 2002.07520.</footer>
"""
