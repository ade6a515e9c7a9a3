"""Each setting says whether it may change when a run is resumed."""

from dmtjepa.config import Config, Resume, changed_settings, parse_config, resume_rules

# Settings that change nothing about what is trained.
FREE = {
    "data": {"num_workers", "pin_mem", "root_path", "max_broken", "allow_changed", "worker_timeout"},
    "logging": {"folder", "loggers", "project"},
    "meta": {"copy_data", "load_checkpoint", "read_checkpoint"},
    "optimization": {"max_skipped_steps"},
    "evaluation": {"batch_size", "data", "every_epochs", "keep_best", "max_images", "measure_start", "neighbors"},
}


def test_rules_of_the_schema():
    rules = resume_rules(Config)
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}
    keys = {f"{section}.{name}" for section, names in sections.items() for name in names}
    assert rules.keys() == keys
    free = {f"{section}.{name}" for section, names in FREE.items() for name in names}
    free |= {key for key in keys if key.startswith("runtime.")}
    free -= {"runtime.seed", "runtime.teacher_precision", "runtime.accumulation"}
    assert {key for key, rule in rules.items() if rule is Resume.FREE} == free
    assert {key for key, rule in rules.items() if rule is Resume.SAME_GLOBAL_BATCH} == {
        "data.batch_size",
        "runtime.accumulation",
    }


def test_only_fixed_settings_count_as_changed():
    earlier = parse_config({"runtime": {"seed": 1}})
    now = parse_config({"runtime": {"seed": 2, "keep_last": 5}, "data": {"batch_size": 4, "crop_size": [64, 32]}})
    assert changed_settings(earlier, now) == [("data.crop_size", 224, [64, 32]), ("runtime.seed", 1, 2)]


def test_the_loader_may_be_called_by_its_name_in_earlier_versions():
    earlier = parse_config({"data": {"loader": "torchvision"}})
    assert earlier.data.loader == "pil"
    assert changed_settings(earlier, parse_config({"data": {"loader": "pil"}})) == []
    assert changed_settings(earlier, parse_config({"data": {"loader": "dali"}})) != []
