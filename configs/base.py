"""The whole schema with its defaults: plain MAE with ViT-B/16 on ImageNet. Every other config starts from it.

A field that is not here is an error, on the command line too. Empty strings and zeros mean "chosen for you" where the
comment says so.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mto_jax import rules


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.task = 'pretrain'  # pretrain, knn, linear, compare, check, report
    c.method = 'mae'  # mae, simmim, or an importable module with build(config)
    c.seed = 0
    c.workdir = ''  # '' for runs/<name of the config>; the same workdir resumes
    c.checkpoint = ''  # for an evaluation: a workdir (its newest step), or workdir/checkpoints/<step>
    c.resume_anyway = False  # resume although fields differ from those the run started with

    c.data = ConfigDict()
    c.data.name = 'imagenet2012'  # a TFDS name; '' where data_dir is itself a prepared TFDS directory; or 'folder'
    c.data.data_dir = ''  # '' for TFDS' own default
    c.data.train_split = 'train'
    c.data.val_split = 'validation'  # watched during development
    c.data.test_split = 'validation'  # reported by task=knn and task=linear
    c.data.image_size = (224, 224)  # height, width
    c.data.channels = 3
    c.data.num_classes = 1000
    c.data.crop = 'random_resized'  # random_resized, or resize (whole image, no crop)
    c.data.crop_area = (0.2, 1.0)  # share of the image a crop covers
    c.data.crop_aspect = (3 / 4, 4 / 3)  # width over height
    c.data.interpolation = 'bicubic'  # of training images: bicubic, bilinear; an evaluation is always bicubic
    c.data.eval_resize = 256  # shorter side before the centre crop, at least; 0 resizes to image_size, no crop
    c.data.flip = True
    c.data.mean = (0.485, 0.456, 0.406)  # of pixels in [0, 1], one per channel
    c.data.std = (0.229, 0.224, 0.225)
    c.data.shuffle_buffer = 20_000  # records; TFRecord only, ArrayRecord permutes exactly
    c.data.on_error = 'raise'  # an image that cannot be decoded: raise, or replace it by the next one that can
    c.data.threads = 0  # of the host pipeline; 0 for one a core

    c.model = ConfigDict()
    c.model.size = 'b'  # nano, micro, ti, s, b, l, h
    c.model.depth = 0  # 0: from the size
    c.model.width = 0
    c.model.heads = 0
    c.model.patch_size = 16
    c.model.mlp_ratio = 4.0
    c.model.position = 'sincos'  # sincos, learned, none
    c.model.relative_bias = False
    c.model.class_token = True
    c.model.qkv_bias = 'qkv'
    c.model.layer_scale = 0.0
    c.model.drop_path = 0.0
    c.model.init = 'mae'  # mae, beit
    c.model.mask_token_scale = 1.0  # factor of the mask token's initial value
    c.model.mask_token_norm = 0.0  # its fixed length; 0: free
    c.model.dtype = 'bfloat16'  # of matrix products; parameters stay float32
    c.model.remat = False
    c.model.attention = 'xla'  # of jax.nn.dot_product_attention: xla, cudnn; '' for plain matrix products

    c.mask_ratio = 0.75
    c.mae = ConfigDict()
    c.mae.decoder_depth = 8
    c.mae.decoder_width = 512
    c.mae.decoder_heads = 16
    c.mae.norm_pix_loss = True
    c.simmim = ConfigDict()
    c.simmim.mask_unit = 2  # patches per side of a masked unit

    c.mto = ConfigDict()  # fields as in mto_jax.mto.Settings
    c.mto.enabled = False
    c.mto.recalibration = 'none'
    c.mto.rows = 'visible'
    c.mto.exclude_blocks = 0
    c.mto.initial_blocks = 0
    c.mto.blocks = ()
    c.mto.affinity = 'attention_mean'
    c.mto.measure = 'entropy'
    c.mto.scale_guard = False
    c.mto.stop_keys = False
    c.mto.stop_previous = True
    c.mto.margin = 0.02
    c.mto.w_spa = 0.0
    c.mto.w_e = 0.0
    c.mto.w_r = 0.0
    c.mto.spa_entropy = False
    c.mto.warmup = 0.05
    c.mto.decay_e = False

    c.batch_size = 4096  # images per step, over all devices
    c.accumulate = 1  # microbatches per step
    c.epochs = 800.0
    c.optim = _optim()

    c.mesh = ConfigDict()  # devices along each axis; -1 for the rest
    c.mesh.data = -1  # splits the batch
    c.mesh.fsdp = 1  # splits the batch, and parameters with their optimizer state
    c.mesh.tensor = 1  # splits heads and MLP

    c.hosts = ConfigDict()  # see mto_jax/hosts.py
    c.hosts.coordinator = 'auto'  # 'auto' finds a TPU slice's or a SLURM step's hosts; host:port; '' for one host
    c.hosts.count = 1  # with host:port: the number of hosts, and this one's own number from 0
    c.hosts.index = 0
    c.hosts.timeout = 300.0  # seconds within which all hosts must have started
    c.allow_cpu = False  # train although no GPU or TPU is found
    c.deterministic = False  # on a GPU: the same result bit by bit each time, slower

    c.log_every = 50  # steps
    c.diagnose_every = 1000  # steps; 0: never
    c.log_images = 6  # shown in pictures of reconstructions

    c.checkpoints = ConfigDict()
    c.checkpoints.every = 1000  # steps; 0: only the last, which is always saved
    c.checkpoints.keep = 2  # newest ones kept; the best is kept beside them

    c.eval = ConfigDict()
    c.eval.every_epochs = 0.0  # kNN during pre-training on val_split; 0: never
    c.eval.batch_size = 512
    c.eval.train_examples = 0  # how many training images the probes use, a fixed random subset; 0: all
    c.eval.features = 'mean'  # mean of the patch tokens, or class
    c.eval.weights = 'student'  # student, or teacher where the method has one
    c.eval.depth = 0  # blocks to apply; 0 for all and the final norm
    c.eval.knn_k = (1, 5, 10, 20)
    c.eval.knn_temperature = 0.07
    c.eval.linear_l2 = (1e-5, 1e-4, 1e-3, 1e-2)  # chosen on a held-out tenth of the training features, per class
    c.eval.linear_steps = 200  # L-BFGS iterations

    c.compare = ConfigDict()  # task=compare
    c.compare.seeds = (0,)  # one pre-training without and one with MTO for each

    c.report = ConfigDict()  # task=report
    c.report.runs = ''  # workdirs of trainings, commas between them

    c.finetune = ConfigDict()  # of a study's runs
    c.finetune.epochs = 0.0  # 0: no fine-tuning
    c.finetune.label_share = 0.1  # of the training images
    c.finetune.batch_size = 128
    c.finetune.optim = _optim()

    c.study = ConfigDict()  # python -m mto_jax.study
    c.study.variants = ConfigDict()  # {name: {field: value}}: changes to this; one is 'baseline', more may begin so
    c.study.seeds = (0,)
    c.study.budgets = ()  # epochs of each training; () for `epochs`. The warm-up and the decays scale along
    c.study.evaluations = 4  # of a training of the largest budget, evenly spaced; the others: at their end only
    c.study.split = 'val'  # where the probes are measured: val while choosing, test to confirm
    c.study.seeds_at_once = 1  # trained side by side in one dispatch
    c.study.index = 0  # this machine's share of the grid: every count-th run from index on
    c.study.count = 1
    return c


def evaluation(task: str) -> ConfigDict:
    """The config of an evaluation: None, for what the checkpoint's own config says, in every field but its own."""
    c = get_config()
    c.task = task
    _unset(c)
    return c


def _unset(c: ConfigDict, prefix: str = '') -> None:
    for name, value in c.items():
        if isinstance(value, ConfigDict):
            _unset(value, f'{prefix}{name}.')
        elif not rules.is_among(prefix + name, rules.EVALUATION):
            c[name] = placeholder(type(value))


def _optim() -> ConfigDict:
    o = ConfigDict()
    o.base_lr = 1.5e-4  # per lr_reference images: lr = base_lr * batch_size / lr_reference
    o.lr_reference = 256
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.05
    o.decay_cls_token = True  # weight decay acts on the class token, as in the official MAE
    o.decay_mask_token = True  # and on the mask token
    o.clip_norm = 0.0  # 0: no clipping
    o.schedule = 'cosine'  # cosine, multistep
    o.warmup_epochs = 40.0
    o.warmup_lr = 0.0  # where the warm-up starts, per lr_reference images like base_lr
    o.min_lr = 0.0
    o.decay_epochs = ()  # multistep: where the rate is multiplied by decay_factor
    o.decay_factor = 0.1
    o.layer_decay = 1.0  # factor of the rate per block, from the head down; 1: none
    return o
