import io

import matplotlib.image
import numpy as np

from coda_ray.tracking.figures import figure_png, matrix_figures, matrix_heatmap
from coda_ray.tracking.table import compile_transfers, job_matrix, matrix_table


def test_a_panel_per_method_on_one_scale_with_every_number(results):
    tidy = matrix_table(compile_transfers(results), "accuracy", "source")
    figure = matrix_heatmap(tidy)
    assert figure.get_suptitle() == "accuracy (%), adapted per source, mean ± std over 2 seeds"
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["supervised", "coda"]
    assert {axes.collections[0].get_clim() for axes in panels} == {(0.0, 50.5)}
    texts = [text.get_text() for text in panels[1].texts]
    assert texts == ["–", "50.5\n± 0.7", "50.5\n± 0.7"]
    assert [t.get_text() for t in panels[0].get_xticklabels()] == ["A", "B", "C"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["A"]


def test_figures_of_a_job_render_without_the_global_state_of_pyplot(results):
    transfers = compile_transfers(results)
    figures = matrix_figures(job_matrix(transfers, {"transfers": transfers["key"].tolist()}))
    assert sorted(figures) == ["matrix-accuracy-source", "matrix-macro_f1-source"]
    picture = matplotlib.image.imread(io.BytesIO(figure_png(figures["matrix-accuracy-source"])))
    assert picture.shape[0] > 200
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 50
