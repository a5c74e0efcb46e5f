"""Templates of supports: resampling and order by hand, views, and pictures that are tiny, thin, torn or outside."""

import numpy as np
import pytest
import torch
from PIL import Image

from fsdet.data.support import Support, SupportSet
from fsdet.methods.os2d.templates import VIEWS, cut_pictures, template_of, view_pictures


def support(path, box=(0.0, 0.0, 8.0, 4.0)):
    return Support(str(path), path.name, None, 0, box)


@pytest.fixture
def file(tmp_path):
    """8 x 4 pixels (width x height), each with its own colour."""
    path = tmp_path / "class.png"
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(4, 8, 3)).save(path)
    return path


class TestTemplate:
    def test_cells_column_by_column(self):
        """Row k of the template is the cell in column k // 15 and row k % 15, of length 1."""
        features = torch.randn(1, 4, 15, 15, generator=torch.Generator().manual_seed(0))
        template = template_of(features)
        assert template.shape == (225, 4)
        for row, column in ((0, 0), (3, 7), (14, 2)):
            cell = features[0, :, row, column]
            torch.testing.assert_close(template[column * 15 + row], cell / (cell.norm() + 1e-5), rtol=0, atol=1e-6)

    def test_resampling_keeps_the_corners(self):
        """29 x 8 cells: every second row, and columns half a cell apart."""
        features = torch.randn(1, 4, 29, 8, generator=torch.Generator().manual_seed(0))
        template = template_of(features).view(15, 15, 4)  # column, row
        for column, row, expected in (
            (0, 0, features[0, :, 0, 0]),
            (14, 14, features[0, :, 28, 7]),
            (6, 2, features[0, :, 4, 3]),
            (5, 2, features[0, :, 4, 2:4].mean(dim=1)),  # normalised after resampling
        ):
            torch.testing.assert_close(template[column, row], expected / expected.norm(), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("size", [(1, 1), (1, 6), (9, 1)])
    def test_a_line_of_cells_is_repeated(self, size):
        features = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
        template = template_of(features).view(15, 15, 4)
        if size[0] == 1:
            torch.testing.assert_close(template, template[:, :1].expand(-1, 15, -1))
        if size[1] == 1:
            torch.testing.assert_close(template, template[:1].expand(15, -1, -1))

    def test_nothing_stays_nothing(self):
        assert not template_of(torch.zeros(1, 4, 3, 3)).any()


class TestViews:
    def test_turns_and_mirrors(self):
        """Counter-clockwise: the right column becomes the upper row."""
        picture = np.array([[1, 2, 3], [4, 5, 6]])[..., None]
        views = [view[..., 0].tolist() for view in view_pictures(picture, "horflip_rotation90")]
        assert views[:4] == [
            [[1, 2, 3], [4, 5, 6]],
            [[3, 6], [2, 5], [1, 4]],
            [[6, 5, 4], [3, 2, 1]],
            [[4, 1], [5, 2], [6, 3]],
        ]
        assert views[4:] == [[row[::-1] for row in view] for view in views[:4]]
        for name, count in (("none", 1), ("rotation90", 4), ("horflip", 2)):
            found = [view[..., 0].tolist() for view in view_pictures(picture, name)]
            assert len(found) == len(VIEWS[name]) == count and all(view in views for view in found)
            assert found[0] == views[0]

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="OS2D.VIEWS is 'flip'.*rotation90"):
            view_pictures(np.zeros((1, 1, 3)), "flip")


class TestPictures:
    def cut(self, *supports, size=8, image_format="BGR", own_format="BGR"):
        support_set = SupportSet(("a",), supports, image_format=own_format)
        return list(cut_pictures(support_set, support_set.shots("a"), size, image_format))

    def test_area_and_channels(self, file):
        """A 2:1 picture at the area of 8 x 8: 11 x 5 pixels. The channel order of the set does not matter."""
        (blue,) = self.cut(support(file))
        (red,) = self.cut(support(file), image_format="RGB")
        (read_red,) = self.cut(support(file), own_format="RGB")
        assert blue.shape == (5, 11, 3) and np.array_equal(blue, red[..., ::-1]) and np.array_equal(blue, read_red)
        picture = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
        assert np.array_equal(red[0, 0], picture[0, 0])

    @pytest.mark.parametrize(
        ("box", "size"), [((3, 1, 4, 2), (8, 8)), ((3.2, 1.3, 3.4, 1.6), (8, 8)), ((0, 2, 8, 3), (2, 22))]
    )
    def test_one_pixel_and_a_line(self, file, box, size):
        """Enlarged to the same area as any other."""
        (picture,) = self.cut(support(file, box))
        assert picture.shape == (*size, 3)
        if size == (8, 8):
            assert (picture == picture[0, 0]).all()

    def test_what_cannot_be_cut_names_the_file(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.png"):
            self.cut(support(tmp_path / "none.png"))
        torn = tmp_path / "torn.png"
        torn.write_bytes(file.read_bytes()[:45])
        with pytest.raises(ValueError, match="torn.png: cannot be decoded"):
            self.cut(support(torn))
        (tmp_path / "text.jpg").write_text("no picture")
        with pytest.raises(ValueError, match="text.jpg"):
            self.cut(support(tmp_path / "text.jpg"))
        with pytest.raises(ValueError, match="class.png.*leaves nothing of its picture of 8 x 4 pixels"):
            self.cut(support(file, (9.0, 0.0, 12.0, 4.0)))
