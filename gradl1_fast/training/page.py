"""The report's text and looks: an HTML page with places for ``string.Template``."""

__all__ = ["PAGE"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gradl1_fast: one network, any bit width</title>
<style>
:root { color-scheme: light; }
body {
  margin: 0; background: #f6f7f9; color: #1f2933; font: 16px/1.6 system-ui, "Segoe UI", Helvetica,
  Arial, sans-serif;
}
main {
  max-width: 62rem; margin: 2rem auto; padding: 2rem 3rem 3rem; background: #fff; border: 1px solid
  #e3e6ea; border-radius: 10px;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
.lead { margin: .4rem 0 1.5rem; color: #52606d; font-size: 1.1rem; }
.found {
  margin: 0; padding: 1rem 1.2rem 1rem 2.2rem; background: #eef5fb; border-left: 4px solid #1b6ca8;
  border-radius: 4px;
}
img { display: block; width: 100%; height: auto; margin: 1rem auto; }
img.narrow { max-width: 46rem; }
table {
  width: 100%; margin: 1rem 0; border-collapse: collapse; font-size: .92rem; font-variant-numeric:
  tabular-nums;
}
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e6ea; }
th { color: #52606d; font-weight: 600; border-bottom: 2px solid #cbd2d9; }
p { max-width: 48rem; }
code { padding: .05rem .3rem; background: #f0f2f5; border-radius: 3px; font-size: .9em; }
footer { margin-top: 2.5rem; color: #7b8794; font-size: .85rem; }
@media (max-width: 50rem) { main { margin: 0; padding: 1.2rem; border: 0; border-radius: 0; } }
@media print {
  body { background: #fff; font-size: 11pt; } main { margin: 0; padding: 0; border: 0; max-width: none; }
  h2 { break-after: avoid; } img, table, .found { break-inside: avoid; }
}
</style>
</head>
<body>
<main>
<h1>One network, any bit width</h1>
<p class="lead">Twin networks, trained on handwritten digits with and without the
gradient-l1 penalty, then quantized on demand.</p>

<h2>What was found</h2>
<ul class="found">$verdict</ul>

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
</main>
</body>
</html>
"""
