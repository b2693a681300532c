"""Tokens as a stream of `datasets`, each row group checked when it is read."""

from pathlib import Path

import datasets
import pyarrow
from pyarrow import parquet

from modeling_encodec.processors.corpus.checksums import check_row_groups, read_notes


class TokenStream(datasets.ArrowBasedBuilder):
    """Builder of `datasets` for the Parquet files that `tokenize` wrote."""

    def __init__(self, folder: Path, manifest: dict, columns: list[str] | None, **options):
        self.folder, self.split, self.columns = folder, manifest["split"], columns
        self.files = [entry["file"] for entry in manifest["files"]]
        super().__init__(dataset_name="tokens", **options)

    def _info(self):
        schema = parquet.read_schema(self.folder / self.files[0])
        unknown = sorted(set(self.columns or ()) - set(schema.names))
        if unknown:
            raise ValueError(f"columns has {unknown[0]!r}, allowed: {', '.join(schema.names)}")
        fields = [schema.field(name) for name in self.columns or schema.names]
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(pyarrow.schema(fields)))

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator(name=self.split, gen_kwargs={"files": self.files})]

    def _generate_tables(self, files):
        """Tables of the row groups of these files, with keys.

        Raises:
            ValueError: at a row group that is damaged.
        """
        for name in files:
            path = self.folder / name
            try:
                notes = read_notes(path)
                with parquet.ParquetFile(path) as file:
                    for number in range(file.num_row_groups):
                        check_row_groups(path, notes, [number])
                        table = file.read_row_group(number, columns=self.columns)
                        yield datasets.builder.Key(name, number), table.cast(self.info.features.arrow_schema)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from None
