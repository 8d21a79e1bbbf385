"""What a training run starts from, opened and checked: its data, its weights, its network.

Nothing is built here. A flag that decides one of the three is read here; `notices` are lists of
what the user is told before the run begins.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace

from cnns.checkpoint.find import find_snapshot
from cnns.checkpoint.snapshot import Snapshot
from cnns.checkpoint.weights import Checkpoint, check_fits, open_checkpoint
from cnns.convert.cache import Settings, convert_for_training
from cnns.data.datasets import open_train_dataset, open_val_dataset
from cnns.data.kinds import Dataset, Synthetic
from cnns.data.synthetic import SyntheticTrainLoader
from cnns.errors import UsageError
from cnns.flags.augment import check_mixing
from cnns.flags.defaults import SYNTHETIC_STEPS_PER_EPOCH, finetune_batch_size
from cnns.flags.network import preprocessing_flags
from cnns.models.layers import Switches
from cnns.models.model import Model, check_blocks, check_switches
from cnns.resume import num_parts


def open_data(
    args: Namespace, notices: list[str], *, settings: Settings
) -> tuple[Dataset, Dataset | None]:
    """The training and validation data, checked; None: no validation. Adds notices for the user.

    Folders of images are converted first, as `settings` say.
    """
    if args.train_data_dir is None:
        batch_size = args.global_batch_size
        pool = SyntheticTrainLoader.POOL_BATCHES * batch_size
        if (args.num_val_examples or 0) > pool:
            raise UsageError(
                f"--num_val_examples={args.num_val_examples}, but synthetic data have {pool} "
                "images; give at most that, or leave the flag out"
            )
        epoch = args.num_examples or SYNTHETIC_STEPS_PER_EPOCH * batch_size
        val_data = Synthetic(num_examples=args.num_val_examples or pool, seed=args.seed)
        return replace(val_data, num_examples=epoch), val_data
    train_dir, val_dir, about = convert_for_training(
        args.train_data_dir, args.val_data_dir, settings=settings
    )
    notices += about
    train_data = open_train_dataset(
        train_dir, part_num=args.train_data_part_num, num_examples=args.num_examples
    )
    if args.batch_size_per_device is None:
        args.batch_size_per_device = finetune_batch_size(
            train_data.num_examples, num_parts(vars(args))
        )
        notices.append(f"Fine-tuning: --batch_size_per_device={args.batch_size_per_device}.")
        args.global_batch_size = args.batch_size_per_device * num_parts(vars(args))
        check_mixing(args)
    batch_size = args.global_batch_size
    if batch_size > train_data.num_examples:
        raise UsageError(
            f"--batch_size_per_device={args.batch_size_per_device} makes batches of {batch_size}, "
            f"and there are {train_data.num_examples} training images; give a smaller one"
        )
    if val_dir is None:
        return train_data, None
    return train_data, open_val_dataset(
        val_dir, part_num=args.val_data_part_num, num_examples=args.num_val_examples
    )


def open_start(args: Namespace, models: Mapping[str, Model]) -> Checkpoint | None:
    """The weights to start from, of any format. Raises UsageError where --finetune has none."""
    if args.finetune and args.model is not None and args.model_load_dir is None:
        args.model_load_dir = models[args.model].installed_weights()
    if args.model_load_dir is not None:
        path = find_snapshot(args.model_load_dir, models=models)
        return open_checkpoint(path, models=models, model=args.model)
    if args.finetune:
        installed = ", ".join(name for name, entry in models.items() if entry.weights)
        raise UsageError(
            "--finetune needs --model_load_dir, the weights to start from, or a --model with "
            f"installed ones ({installed})"
        )
    return None


def describe_network(
    args: Namespace,
    notices: list[str],
    *,
    models: Mapping[str, Model],
    start: Checkpoint | None,
    train_data: Dataset,
    switches: Switches,
) -> Snapshot:
    """What the network is; adds notices for the user.

    Model, class count and preprocessing are those of the flags, else of the weights to start from,
    else of the training data and the table of models.
    """
    known = start.snapshot if start else None
    if start is not None:
        notices += start.notices()
        check_fits(
            start,
            models=models,
            model=args.model,
            num_classes=args.num_classes,
            finetune=args.finetune if args.resume is None else None,
        )
    model = args.model or (known.model if known else "resnet50")
    check_switches(models, model, switches)
    check_blocks(models, model, stochastic_depth=args.stochastic_depth)
    num_classes: int | None
    if known and not args.finetune:
        num_classes, classes = known.num_classes, train_data.classes or known.classes
    else:
        num_classes = args.num_classes or train_data.num_classes
        if num_classes is None and known:
            num_classes = known.num_classes
        classes = train_data.classes
    if num_classes is None:
        num_classes = 1000
        if args.train_data_dir is not None:
            notices.append(
                f"Classes: 1000 ({args.train_data_dir} does not say; see --num_classes)."
            )
    own = known.preprocessing if known else models[model].preprocessing()
    preprocessing = models[model].override(
        own, interpolation=args.interpolation, **preprocessing_flags(args)
    )
    for name in ("train_image_size", "first_train_image_size"):
        if getattr(args, name) is not None:
            models[model].check_size(getattr(args, name), f"--{name}")
    if args.first_train_image_size is not None and args.num_epochs < 2:
        raise UsageError("--first_train_image_size needs two epochs or more; see --num_epochs")
    last = args.train_image_size or preprocessing.image_size
    if args.first_train_image_size is not None and args.first_train_image_size >= last:
        raise UsageError(
            f"--first_train_image_size={args.first_train_image_size} must be less than {last}, the "
            "size that training crops grow to (--train_image_size, else --image_size)"
        )
    return Snapshot(model, num_classes, preprocessing, classes)
