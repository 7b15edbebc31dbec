"""The questions of Visual Genome (Krishna et al. 2017, visualgenome.org), which can be added to VQA v2 training."""

from collections.abc import Mapping

from maskvlm.data.files import get, load_json, opened
from maskvlm.data.raw.genome import genome_photo_id
from maskvlm.data.table import ParsedColumns, RowOrigin, TableRows
from maskvlm.utils.errors import ExitCode, UserError
from tasks.vqa.vocabulary import get_text

LAYOUT = "Visual Genome"


def parse_genome(origin: RowOrigin, coco_ids: Mapping[int, int]) -> ParsedColumns:
    """Visual Genome's questions with their single answer; ids start with `vg`, as VQA v2's also count from 1.

    Args:
        origin: origin of the rows.
        coco_ids: image number -> COCO number, for images that are also in COCO.
    """
    # `place` counts questions over the whole file, as in error messages.
    rows, place = TableRows(origin, "qa_id"), 0
    with opened(origin.file) as stream:
        document = load_json(stream.read(), origin.file)
    if not isinstance(document, list):
        what = f"{type(document).__name__} instead of a list of images with `qas`"
        raise UserError(origin.file, what, "Use question_answers.json as distributed", ExitCode.BAD_DATA)
    for position, entry in enumerate(document):
        where = f"{origin.file} [{position}]"
        image = get(entry, "id", int, where, LAYOUT)
        for number, record in enumerate(get(entry, "qas", list, where, LAYOUT)):
            inside = f"{where}.qas[{number}]"
            rows.add(
                place=place,
                id=f"vg {get(record, 'qa_id', int, inside, LAYOUT)}",
                images=[genome_photo_id(image, coco_ids)],
                text=get(record, "question", str, inside, LAYOUT),
                answers=[get_text(record, "answer", inside)],
            )
            place += 1
    return rows.finish()
