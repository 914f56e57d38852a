"""Everything that touches a live model: loading, anatomy, corpora and batches, taps and probes."""

from moescope.core.kernel import without_widget_notices

without_widget_notices()  # before anything here brings transformers in
