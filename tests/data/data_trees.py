"""Pieces of the synthetic data trees of conftest.py. All pictures are 100 x 80 pixels (width x height)."""

import json
import shutil

from fsdet.data.fake_tree import voc_xml

WIDTH, HEIGHT = 100, 80


OWN_CLASSES = {9: "gizmo", 5: "widget", 7: "gadget"}


def voc_object(name, box, difficult=0):
    return {"name": name, "bbox": box, "difficult": difficult}


def write_voc_image(folder, image_id, objects, picture=None):
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages").mkdir(exist_ok=True)
    content = {"folder": folder.name, "filename": f"{image_id}.jpg", "width": WIDTH, "height": HEIGHT}
    (folder / "Annotations" / f"{image_id}.xml").write_text(voc_xml({**content, "objects": objects}))
    if picture:
        shutil.copy(picture, folder / "JPEGImages" / f"{image_id}.jpg")


def write_image_set(folder, name, ids):
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{image_id}\n" for image_id in ids))


def coco_json(images, annotations, names):
    return {
        "images": [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in images],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }


def box_of(number, image_id, category, box, **more):
    area = box[2] * box[3]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": 0,
        **more,
    }


def edit_json(path, change):
    """Load a json, let `change` alter it, write it back."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
