"""Who imports whom: downwards only, and files that travel to the Hub import nothing that does not."""

import ast
import subprocess
import sys
from pathlib import Path

import modeling_encodec


ROOT = Path(__file__).parents[1]
LAYERS = {
    "inputs_encodec": -2,
    "processors.inputs_encodec": -2,
    "json_files_encodec": -2,
    "processors.json_files_encodec": -2,
    "parameter_counts_encodec": -2,
    "checked_config_encodec": -1,
    "loading_encodec": -1,
    "processors.upstream_encodec": -1,
    "stop_signals": -1,
    "devices": -1,
    "atomic": 0,
    "plots": 1,
    "run_folder": 1,
    "worker_processes": 0,
    "checkpoints": 0,
    "batching_encodec": 0,
    "chunks_encodec": 1,
    "weight_cache_encodec": -1,
    "configuration_encodec": 0,
    "bitstream.bit_packing": 0,
    "bitstream.ecdc": 1,
    "bitstream.arithmetic_coder": 2,
    "bitstream.container": 2,
    "evaluation.mel_filters": -1,
    "evaluation.mel": 0,
    "evaluation.metrics": 1,
    "evaluation.intervals": 0,
    "evaluation.perceptual": 4,
    "evaluation.clips": 6,
    "evaluation.systems": 9,
    "evaluation.scoring": 10,
    "evaluation.evaluation": 11,
    "evaluation.report": 12,
    "evaluation.mushra_key": 0,
    "evaluation.loudness": 0,
    "evaluation.mushra_stimuli": 1,
    "evaluation.mushra_results": 1,
    "evaluation.mushra_preparation": 4,
    "evaluation.mushra_analysis": 2,
    "processors.audio_parts": 0,
    "processors.audio_ffmpeg": 0,
    "processors.audio_kinds": 1,
    "processors.audio_containers": 1,
    "processors.audio_streams": 1,
    "processors.audio_files": 2,
    "processors.audio": 3,
    "processors.feature_extraction_encodec": 0,
    "processors.code_layouts": 0,
    "processors.code_vocabulary": 1,
    "processors.processing_encodec": 4,
    "processors.corpus.checksums": 1,
    "processors.corpus.token_stream": 7,
    "processors.corpus.rows": 6,
    "processors.corpus.files": 7,
    "processors.corpus.tables": 7,
    "processors.corpus.tars": 7,
    "processors.corpus.sources": 8,
    "processors.audio_tokens": 9,
    "processors.dataset_tokenization": 10,
    "processors.corpus.loading": 10,
    "processors.corpus.shards": 11,
    "processors.corpus.tokenization": 12,
    "processors.corpus.ray": 13,
    "processors.corpus.comparison": 13,
    "conversion.audiocraft_settings": 0,
    "conversion.released": 1,
    "conversion.key_mapping": 2,
    "conversion.checkpoint_files": 3,
    "conversion.architecture": 4,
    "conversion.verification": 6,
    "conversion.checkpoint_writing": 7,
    "conversion.convert": 8,
    "conversion.card_values": 8,
    "conversion.model_card": 9,
    "conversion.push_to_hub": 10,
    "quantization_encodec": 1,
    "kernels_encodec": 0,
    "training_kernels_encodec": 0,
    "onednn_encodec": -1,
    "layers_encodec": 1,
    "seanet_encodec": 2,
    "outputs_encodec": 0,
    "precision_encodec": 0,
    "pickling_encodec": 0,
    "integer_lm_encodec": 1,
    "calibration_lm_encodec": 2,
    "modeling_encodec": 3,
    "modeling_lm_encodec": 4,
    "auto_classes": 5,
    "ties": 0,
    "bitstream.fingerprints": 5,
    "stream_steps": 4,
    "streaming": 7,
    "bitstream.segment_coders": 5,
    "bitstream.original_lm": 5,
    "bitstream.original_file": 6,
    "bitstream.codes_file": 6,
    "bitstream.concealment": 7,
    "bitstream.compression": 8,
    "bitstream.inspection": 9,
    "demo": 9,
    "web_demo.clips": 10,
    "web_demo.page": 11,
    "web_demo.guard": 11,
    "web_demo.serving": 12,
    "training.options": -1,
    "training.configuration": 1,
    "training.lm_configuration": 1,
    "training.optimization": 0,
    "training.discriminator": 1,
    "training.balancer": 0,
    "training.in_memory": 6,
    "training.packed_corpora": 6,
    "parts": 1,
    "training.guards": 0,
    "training.losses": 1,
    "training.command": 1,
    "training.adversary": 2,
    "training.segments": 3,
    "training.clips": 4,
    "training.debian_corpora": 4,
    "training.corpora": 5,
    "training.reverberation": 5,
    "training.codec_update": 4,
    "training.reporting": 3,
    "training.checkpoint": 4,
    "training.mixing": 7,
    "training.validation": 6,
    "training.code_sequences": 5,
    "training.lm_update": 5,
    "training.run": 11,
    "training.trainer": 12,
    "training.lm_trainer": 12,
    "export": 6,
    "live": 8,
    "doctor.environment": 0,
    "doctor.golden": 6,
    "doctor.checks": 8,
    "doctor.examination": 9,
    "doctor.remake": 9,
    "commands.shared": 0,
    "commands.coding": 10,
    "commands.models": 10,
    "commands.convert": 10,
    "commands.demo": 13,
    "commands.doctor": 10,
    "commands.plot": 11,
    "commands.push": 11,
    "commands.parts": 2,
    "commands.tokenize": 14,
    "commands.mushra": 13,
    "commands.evaluate": 14,
    "examples.audio_lm": 10,
    "cli": 15,
    "__main__": 16,
}
SOURCES = {
    **{path.relative_to(ROOT / "modeling_encodec"): path for path in (ROOT / "modeling_encodec").rglob("*.py")},
    **{
        path.relative_to(ROOT): path
        for folder in ("processors", "conversion")
        for path in (ROOT / folder).rglob("*.py")
    },
}


def module_name(relative: Path) -> str:
    return ".".join(relative.with_suffix("").parts)


def imports_of(relative: Path) -> list[tuple[str, int]]:
    """(module, level) of every import of ours, wherever in the file."""
    path, found = SOURCES[relative], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("modeling_encodec")):
            module = (node.module or "").removeprefix("modeling_encodec").lstrip(".")
            if node.level == 1 and node.module:
                module = ".".join([*relative.parent.parts, node.module])
            modules = [f"{module}.{name.name}" for name in node.names if f"{module}.{name.name}" in LAYERS]
            found += [(target, node.level) for target in modules or [module]]
        elif isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] in ("processors", "conversion") for name in node.names), path
    return found


def test_every_module_has_a_layer_and_imports_downwards():
    for relative, path in SOURCES.items():
        if path.name == "__init__.py":
            continue
        name = module_name(relative)
        for target, _ in imports_of(relative):
            assert LAYERS[target] < LAYERS[name], f"{name} imports {target}"


def test_files_for_the_hub_import_only_siblings():
    """Files of these names travel, and with them what they import, into one flat folder."""
    travelling = [relative for relative in SOURCES if relative.stem.endswith("_encodec")]
    for relative in travelling:
        for target, level in imports_of(relative):
            sibling = Path(*target.split(".")).with_suffix(".py")
            assert level == 1 and sibling in SOURCES, f"{relative} imports {target}"
            assert sibling.parent == relative.parent, f"{relative} imports {target}"
            travelling += [sibling] if sibling not in travelling else []
    assert Path("processors/code_layouts.py") in travelling
    texts = {(relative.name, SOURCES[relative].read_text()) for relative in travelling}
    assert len({name for name, _ in texts}) == len(texts)  # files of one name are the same


def test_public_names_are_sorted_real_and_lazy():
    assert modeling_encodec.__all__ == sorted(modeling_encodec.__all__)
    for name in modeling_encodec.__all__:
        assert getattr(modeling_encodec, name).__doc__
    code = "import sys, modeling_encodec; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_and_public_function_is_documented():
    for path in SOURCES.values():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
