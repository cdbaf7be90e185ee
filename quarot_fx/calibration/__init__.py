"""Calibration: weights are rounded so that what their layers compute on real inputs changes least (GPTQ, Frantar et al.
2022; QuaRot, section 4); clip ratios and bits of layers are chosen likewise.

``calibrate``   the public function: from one weight to the next, in the order in which a model computes
``options``     of GPTQ
``data``        token ids from tensors, texts and datasets
``stream``      runs a captured graph on all calibration sequences, as far as it is asked to
``products``    which rows of an input meet which matrix: one for all, or an expert's for each
``hessian``     what is to be known of these rows
``gptq``        the rounding itself, a function of a matrix and a Hessian; ``nearest``, likewise
``descent``     what makes better codes and scales of those that GPTQ found
``rounded``     what comes of either, and what it changes
``weight_clips``, ``activation_clips``, ``cache_clips``  clip ratios that are searched for on the data
``bits``        widths of layers within a budget: ``sensitivity`` measures them, and ``knapsack`` chooses
``calibrated``  where the codes wait for the graphs that are compiled
``state``       what an interrupted calibration goes on from
``report``      what was found
"""
