"""Wrong inputs of the main job, a line each: the arguments as a shell reads them, `=>`, and a part of what is told.

`{LONG}` stands for 5,000 digits, `{WORD}` for 5,000 letters, `{NAME}` for 300, `{DEEP}` for 5,000 nested lists. Files are
those of `wrong_input_files.write_files`.
"""

from __future__ import annotations

import shlex

SETTINGS = r"""
--colour red => unknown setting 'colour'
--mask.ratoi 0.5 => did you mean 'mask.ratio'
--{WORD} 3 => unknown setting 'aaaaaaa
--mask 0.5 => 'mask' is a section of settings
--data.sources x => unknown setting 'data.sources'; did you mean 'data.source'
--backbone.model_arg.depth 3 => unknown setting
--a.b.c.d.e.f.g 3 => unknown setting
-- => unexpected argument '--'
stray => unexpected argument 'stray'
a b c d e f g h => unexpected arguments 'a', 'b', 'c', 'd', 'e', \.\.\.
{WORD} => unexpected argument 'aaaaaaa
--seed => --seed needs a value
--seed '' => --seed needs a value
--seed ' ' => --seed needs a value
--seed -1 => seed must be a whole number of at least 0
--seed 1.5 => seed must be a whole number
--seed one => seed must be a whole number
--seed null => seed must be a whole number
--seed true => seed must be a whole number
--seed [1] => seed must be a whole number
--seed {LONG} => a number of 5000 digits is too large
--seed 0x{LONG} => too large
--seed 18446744073709551616 => at most 63 bits
--seed 9223372036854775808 => at most 63 bits
--data.split_seed 9999999999999999999 => data.split_seed must be .*63 bits
--data.split_seed -3 => data.split_seed must be a whole number
--schedule.epochs 0 => schedule.epochs must be a whole number of at least 1
--schedule.epochs ten => schedule.epochs must be .*not 'ten'
--schedule.epochs 1e2 => schedule.epochs must be .*not 1e2
--schedule.epochs 1000000000000000000000000000000 => schedule.epochs .*too large
--schedule.epochs 1000001 => schedule.epochs must be at most 1000000, not 1000001
--schedule.epochs {LONG} => 5000 digits
--schedule.warmup_epochs -1 => schedule.warmup_epochs must be a number of at least 0
--schedule.warmup_epochs 1e9 => schedule.warmup_epochs must be below schedule.epochs
--schedule.warmup_epochs .nan => schedule.warmup_epochs must be a number
--schedule.warmup_epochs 1e999 => schedule.warmup_epochs must be a number
--schedule.resolution 32 => schedule.resolution must be
--schedule.resolution [[0]] => schedule.resolution must be
--schedule.resolution [[0,32],[0,48]] => schedule.resolution must begin with epoch 0
--schedule.resolution [[1,32]] => schedule.resolution must begin with epoch 0
--schedule.resolution [[0,32.5]] => schedule.resolution: pixels .* must be a whole number
--schedule.resolution [[0,99999999]] => schedule.resolution must be at most
--schedule.resolution [[0,-32]] => schedule.resolution
--blocks 0 => blocks must be a whole number of at least 1
--blocks [] => blocks must be
--blocks [2,0] => blocks must be
--blocks yes => blocks must be
--blocks 100000000000000000 => blocks must be at most 1000
--blocks 100000000000000000000 => blocks must be .*too large
--blocks [1000000000000] => blocks must be at most 1000
--mask.ratio 0 => mask.ratio must be a number above 0 and below 1
--mask.ratio 1 => mask.ratio must be
--mask.ratio -.5 => mask.ratio must be
--mask.ratio .nan => mask.ratio must be
--mask.ratio .inf => mask.ratio must be
--mask.ratio [0.8,0.6] => mask.ratio must not decrease
--mask.ratio [0.5,0.6,0.7] => mask.ratio lists 3 values for 4 blocks
--mask.ratio '{a: 1}' => mask.ratio must be
--mask.ratio 1e-400 => mask.ratio must be
--mask.encode some => mask.encode must be auto, visible or all
--mask.per_batch 3 => mask.per_batch must be true or false
--mask.sweep_groups maybe => mask.sweep_groups must be true or false
--decoder.depth 0 => decoder.depth must be
--decoder.depth 1000000 => decoder.depth must be at most 1000
--decoder.depth [1,2] => decoder.depth lists 2 values for 4 blocks
--decoder.dim 10000000 => decoder.dim must be at most 65536
--decoder.dim -4 => decoder.dim must be
--decoder.num_heads 0 => decoder.num_heads must be
--decoder.throw_ratio 1 => decoder.throw_ratio must be
--decoder.throw_ratio -0.1 => decoder.throw_ratio must be
--decoder.recovery all => decoder.recovery must be none or aggregate
--decoder.sampler best => decoder.sampler must be
--decoder.thrown_weight 0 => decoder.thrown_weight must be
--decoder.thrown_weight 1e300 => decoder.thrown_weight must be at most 1000000
--target.name 'si ft' => target.name must be pixels, hog, the name of a registered target, or a list of them
--target.name [hog,5,hog,hog] => target.name must be
--decoder.name [auto,auto] => decoder.name lists 2 values for 4 blocks
--plugins my-module => plugins must be names of modules
--plugins ./my_module.py => plugins must be names of modules
--target.cell 0 => target.cell must be
--target.cell 1000000 => target.cell must be at most 8192
--target.bins 1000000 => target.bins must be at most 1024
--target.normalize 2 => target.normalize must be true or false
--data.batch_size 0 => data.batch_size must be
--data.batch_size 1e3 => data.batch_size must be
--data.batch_size 99999999999 => data.batch_size must be at most
--data.accumulate 0 => data.accumulate must be
--data.accumulate 99999999999 => data.accumulate must be at most
--data.workers -1 => data.workers must be
--data.workers 1000000 => data.workers must be at most 1024
--data.crop_scale 0.5 => data.crop_scale must be two numbers
--data.crop_scale [0.9,0.2] => data.crop_scale must be \[smallest, largest\]
--data.crop_scale [0,1] => data.crop_scale must be two numbers
--data.crop_scale [0.1,0.5,1] => data.crop_scale must be two numbers
--data.flip maybe => data.flip must be true or false
--data.flip 1 => data.flip must be true or false
--data.val_fraction 1 => data.val_fraction must be
--data.val_fraction .6 --data.test_fraction .6 => data.val_fraction . data.test_fraction must be below 1
--data.max_bad_fraction 2 => data.max_bad_fraction must be
--data.max_bad_fraction -1 => data.max_bad_fraction must be
--data.source {WORD} => data.source has 5000 characters
--data.source 'a\nb' => data.source holds a line break or another control character
--data.image_column '' => --data.image_column needs a value
--optim.blr 0 => optim.blr must be a number above 0
--optim.blr -1 => optim.blr must be
--optim.blr .nan => optim.blr must be
--optim.blr 1e300 => optim.blr must be at most 1000000
--optim.blr fast => optim.blr must be
--optim.weight_decay -1 => optim.weight_decay must be
--optim.betas 0.9 => optim.betas must be two numbers
--optim.betas [0.9,1.0] => optim.betas must be two numbers
--optim.clip_grad 0 => optim.clip_grad must be
--optim.precision half => optim.precision must be auto, fp32, bf16 or fp16
--checkpoint.every_epochs 0 => checkpoint.every_epochs must be
--checkpoint.keep 0 => checkpoint.keep must be
--checkpoint.keep {LONG} => checkpoint.keep must be .*5000 digits
--evaluation.knn_k 0 => evaluation.knn_k must be
--evaluation.knn_temperature 0 => evaluation.knn_temperature must be
--evaluation.batch_size -2 => evaluation.batch_size must be
--evaluation.batch_size 99999999999 => evaluation.batch_size must be at most
--evaluation.latency soon => evaluation.latency must be true or false
--failures.max_restarts -1 => failures.max_restarts must be
--failures.max_restarts 99999999999 => failures.max_restarts must be at most
--placement.backend slurm => placement.backend must be ray or in_process
--placement.stages 0 => placement.stages must be
--placement.stages 7 => placement.stages must be at most 4
--placement.gpus_per_stage 2 => placement.gpus_per_stage must be
--placement.cpus_per_stage -1 => placement.cpus_per_stage must be
--placement.cpus_per_stage 1e30 => placement.cpus_per_stage must be at most
--placement.threads_per_stage 1000000 => placement.threads_per_stage must be at most 1024
--placement.threads_per_stage 0 => placement.threads_per_stage must be
--placement.window 0 => placement.window must be
--placement.window 99999999 => placement.window must be at most
--placement.wait_s 1e300 => placement.wait_s must be at most
--search.trials -1 => search.trials must be
--search.trials 99999999 => search.trials must be at most
--search.trial_epochs 0 => search.trial_epochs must be
--search.reduction_factor 1 => search.reduction_factor must be
--search.searcher best => search.searcher must be random or optuna
--search.space mask.ratio => search.space must be
--search.space.optim.blr 0.1 => search.space: optim.blr must be a list of values to try
--search.space '{optim.blr: [.inf]}' => search.space.optim.blr must be a finite number
--search.space '{optim.blr: {low: 1, high: .nan}}' => search.space.optim.blr
--search.grace_epochs 1000 --search.trials 2 => search.grace_epochs must be at most
--search.resume => search.resume needs out
--tracking.uri '' => --tracking.uri needs a value
--tracking.uri {WORD} => tracking.uri has 5000 characters
--tracking.experiment {WORD} => tracking.experiment has 5000 characters
--name '' => --name needs a value
--name 'a b' => name must be a word
--name a/b => name must be a word
--name ../a => name must be a word
--name {NAME} => name has 300 characters
--out {WORD} => out has 5000 characters
--out {NAME} => more than 255 bytes
--out 'a\tb' => out holds a line break or another control character
--resume => resume needs out
--resume maybe => resume must be true or false
--baseline moco => baseline must be none or mae
--boundary_noise -1 => boundary_noise must be
--boundary_noise 1e9 => boundary_noise must be at most 1000
--init_from {WORD} => init_from has 5000 characters
--init_from {NAME} => init_from has a file name of more than 255 bytes
--backbone.model_args 3 => backbone.model_args must be a mapping
--backbone.model_args '{depth: 10000000}' => backbone.model_args.depth must be at most 1000
--backbone.model_args.depth 1000000 => backbone.model_args.depth must be at most 1000
--backbone.model_args.img_size 100000 => backbone.model_args.img_size must be at most 8192
--backbone.model_args.embed_dim 100000000000 => backbone.model_args.embed_dim must be at most
--backbone.model_args.depth .nan => backbone.model_args.depth must be
--backbone.model_args.x {DEEP} => nested more than 30 levels deep
--backbone.model_args '{a: &a [1], b: !!python/tuple [1]}' => backbone.model_args must be a mapping
--backbone.model_args '{a: &a [*a]}' => a value contains itself
--backbone.model_args '{a: 1, a: 2}' => backbone.model_args must be a mapping
--backbone.name '' => --backbone.name needs a value
--backbones [] => backbones
--backbones 3 => backbones must be
--backbones '[{model_args: {depth: 3}}]' => backbones: entry 1
--backbones '[{name: vit_tiny_patch16_224, colour: red}]' => backbones: entry 1
--backbones vit_tiny_patch16_224,vit_small_patch16_224 --search.trials 2 => --search.trials: a search is for one backbone
--backbones vit_tiny_patch16_224,resnet50 --search.trials 2 --search.searcher random => --search.searcher: a search is for
--backbones vit_tiny_patch16_224,vit_small_patch16_224 --backbone.model_args.depth 3 => each backbone has its own model_args
--recipe => --recipe needs a name or a file
--recipe digits_dem => did you mean 'digits_demo'
--recipe nowhere.yaml => no recipe and no file is called 'nowhere.yaml'
--recipe {WORD} => cannot read the recipe 'aaa.*File name too long
--recipe . => recipe '.' is a folder
--recipe /dev/zero => recipe '/dev/zero' is a device or a pipe
--recipe pipe.png => recipe 'pipe.png' is a device or a pipe
--recipe photo.png => photo.png is not a text file
--recipe recipes/binary.yaml => not a text file
--recipe recipes/nul.yaml => recipes/nul.yaml is not valid YAML
--recipe recipes/huge.yaml => has more than 256 KiB, which is no recipe
--recipe recipes/list.yaml => does not hold settings
--recipe recipes/text.yaml => does not hold settings
--recipe recipes/empty.yaml => missing setting 'name'
--recipe recipes/twice.yaml => 'seed' appears twice
--recipe recipes/recursive.yaml => a value contains itself
--recipe recipes/recursive_map.yaml => a value contains itself
--recipe recipes/deep.yaml => nested more than 30 levels deep
--recipe recipes/deep_blocks.yaml => nested more than 30 levels deep
--recipe recipes/bomb.yaml => more than 20000 values, with aliases written out
--recipe recipes/tag_int.yaml => 'abc' is no int
--recipe recipes/tag_float.yaml => 'x' is no float
--recipe recipes/tag_bool.yaml => 'maybe' is no bool
--recipe recipes/tag_null.yaml => 'x' is no null
--recipe recipes/tag_python.yaml => could not determine a constructor for the tag
--recipe recipes/tag_binary.yaml => could not determine a constructor for the tag
--recipe recipes/tag_set.yaml => could not determine a constructor for the tag
--recipe recipes/tag_time.yaml => could not determine a constructor for the tag
--recipe recipes/anchor.yaml => found undefined alias
--recipe recipes/digits.yaml => a number of 5000 digits is too large
--recipe recipes/documents.yaml => found another document
--recipe recipes/unknown.yaml => recipes/unknown.yaml: unknown setting 'mask.ratoi'
--recipe recipes/flat.yaml => in a file is written nested
"""
"""What ends before torch is imported."""

SOURCES = r"""
--target.name sift => target.name must be pixels.* not 'sift'
--target.name [hog,hgo,hog,hog] => target.name must be .* did you mean 'hog'
--decoder.name deep => decoder.name must be auto.* not 'deep'
--decoder.name light => 'light' is for blocks that encode all tokens
--plugins no_such_module => there is no module 'no_such_module'
--plugins colorsys.module => no module 'colorsys.module'
--data.source dataset:Mine => given as an object in Python
--data.source nowhere => data.source 'nowhere' does not exist
--data.source '' => --data.source needs a value
--data.source null => data.source 'null' does not exist
--data.source photo.png => data.source '.*photo.png' is a file, but not .parquet
--data.source pipe.png => data.source '.*pipe.png' is no folder or file of images
--data.source pipe.parquet => data.source '.*pipe.parquet' is no folder or file of images
--data.source /dev/zero => data.source '/dev/zero' is no folder or file of images
--data.source /proc => data.source '/proc' is no folder or file of images
--data.source digits:8 => data.source 'digits' takes no argument
--data.source empty => empty holds no images
--data.source pipes => pipes holds no images
--data.source both => holds Parquet files .* and images
--data.source loop => loop holds no images
--data.source damaged => none of \d+ images of the train split of .* can be read; the first: 
--data.source links => none of \d+ images of the train split of .* can be read; the first: .*No such file
--data.source few => few has \d+ images to split, and data.val_fraction=0.1
--data.source flat --data.batch_size 999 => flat has \d+ images to train on, fewer than one step's data.batch_size=999
--data.source flat --data.image_column image => apply to Parquet, unlike data.source '.*flat'
--data.source flat --data.label_column label => apply to Parquet
--data.source text.parquet => text.parquet cannot be read as Parquet
--data.source empty.parquet => empty.parquet has no rows
--data.source no_image.parquet => no_image.parquet has no image column
--data.source junk.parquet => none of \d+ images of the train split of .*junk.parquet can be read
--data.source good.parquet --data.label_column nothing => has no column 'nothing', which data.label_column names
--data.source good.parquet --data.image_column label => holds no image bytes
--data.source good.parquet --data.label_column half => leaves \d+ of \d+ rows without a label
--data.source good.parquet --data.label_column score => holds numbers that are not whole
--data.source good.parquet --data.label_column tags => neither integers nor strings
--data.source mixed => a.parquet and b.parquet are not of one data set
--data.source kinds => has strings for labels and .* numbers, which cannot be compared
--data.source torchvision: => torchvision's data set '' does not exist
--data.source torchvision:CIFAR11 => did you mean 'torchvision:CIFAR10'
--data.source torchvision:FakeData => torchvision's data set 'FakeData' is no set of images of classes
--data.source torchvision:LSUN => torchvision's data set 'LSUN' is no set of images of classes
--data.source torchvision:wrap_dataset_for_transforms_v2 => torchvision's data set .* is no set of images of classes
--data.source torchvision:CIFAR10:empty => torchvision's CIFAR10 cannot be opened below
--init_from nowhere => init_from 'nowhere' is neither a timm name nor a folder nor a file of weights
--init_from vit_tiny_patch16_22 => did you mean 'vit_tiny_patch16_224'
--init_from /dev/zero => init_from '/dev/zero' is neither
--init_from pipe.png => init_from '.*pipe.png' is neither
--init_from empty => the folder '.*empty' holds neither model.safetensors nor
--init_from local-dir:nowhere => there is no folder 'nowhere'
--init_from recipes/list.yaml => cannot be read as weights
--init_from notes.pth => cannot be read as weights
--init_from notes.safetensors => cannot be read as weights
--init_from pickle.pth => cannot be read as weights .*nothing else is unpickled
--init_from photo.png => cannot be read as weights
--init_from none.pth => holds no named tensors
--init_from other.safetensors => which the backbone needs; check backbone.name
--init_from badconfig => is not a timm config
--backbone.name vit_tiny_patch16_22 => unknown backbone 'vit_tiny_patch16_22'; the nearest timm names
--backbone.name efficientnet_b0 => cannot be cut into blocks
--backbone.name /etc/passwd => unknown backbone
--blocks 9 => ask for 8 at most
--blocks [2,2,2,1] => make them add up to 8
--backbone.model_args.img_size 33 => image size 33 x 33 is not divisible
--backbone.model_args '{img_size: 32, patch_size: 4, depth: 8, colour: red}' => colour
--backbone.model_args '{img_size: 32, patch_size: 4, embed_dim: 33, depth: 8, num_heads: 4}' => backbone
--mask.ratio 0.9999 => leaves block 0 no visible unit
--decoder.dim 30 --decoder.num_heads 4 => decoder
--decoder.dim 60000 --decoder.depth 900 => million parameters
--data.batch_size 1000000 --backbone.model_args.img_size 512 --backbone.model_args.patch_size 16 => GiB; lower
--backbone.model_args.img_size 8192 --backbone.model_args.patch_size 8 => tokens in block 0; at most
--search.space '{mask.colour: [1]}' --search.trials 2 => mask.colour
--search.space '{seed: [1]}' --search.trials 2 => seed
--out photo.png => which is a file
--out used => is in use
--out empty --resume => there is no run to resume in
"""
"""What is found with the backbone and the images."""

SHELL = (
    "--mask.ratoi 0.5",
    "--seed {LONG}",
    "--recipe recipes/bomb.yaml",
    "--recipe /dev/zero",
    "--recipe recipes/binary.yaml",
    "--data.source pipe.png",
    "--data.source damaged",
    "--data.source mixed",
    "--init_from notes.pth",
    "--out used",
)
"""Those that are also tried in a process of their own."""


def cases(table: str) -> list[tuple[str, str]]:
    """(arguments, part of the message) of each line."""
    lines = [line for line in table.strip().splitlines() if line]
    return [(line.partition(" => ")[0], line.partition(" => ")[2]) for line in lines]


def argv_of(line: str) -> list[str]:
    """The arguments of a case."""
    texts = {
        "{LONG}": "9" * 5000,
        "{WORD}": "a" * 5000,
        "{NAME}": "a" * 300,
        "{DEEP}": "[" * 5000 + "]" * 5000,
    }
    for name, text in texts.items():
        line = line.replace(name, text)
    return [token.replace("\\n", "\n").replace("\\t", "\t") for token in shlex.split(line, posix=True)]
