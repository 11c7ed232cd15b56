"""Every key once, with the default it has where a config says nothing. Other configs start from here."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 123  # of initialisation, shuffling, augmentation, time and perturbation
    c.init = ""  # weights to start from: Stable Diffusion's (folder, file or hub repository) or a trained flow's
    c.objective = "semflow"  # semflow | symmflow: image and mask flow at once, each to noise; see coupling.py
    c.num_steps = 10_000
    c.batch_size = 32  # of all devices together
    c.cpu_devices = 1  # that the processor is split into where there is no accelerator

    c.mesh = ConfigDict()  # their product is the number of devices; one of them may be -1, the rest
    c.mesh.data = -1  # examples are split
    c.mesh.fsdp = 1  # examples are split, and what is stored of parameters, moments and average
    c.mesh.tensor = 1  # layers are split
    c.mesh.explicit = False  # each device runs its own program, as with pmap; False: the compiler divides the work

    c.data = ConfigDict()
    c.data.name = "folder"  # avatars | camvid | folder
    c.data.source = config_dict.placeholder(str)  # raw files, for folder and camvid
    c.data.dir = config_dict.placeholder(str)  # the prepared set; by default in $SEMFLOW_CACHE, made when missing
    c.data.size = (256, 256)  # height, width
    c.data.fit = "stretch"  # stretch | crop | cover: how an image of another shape comes to that size
    c.data.num_train = config_dict.placeholder(int)  # None: all there are
    c.data.num_val = config_dict.placeholder(int)
    c.data.seed = 0
    c.data.balance = 0.0  # exponent by which examples with rare classes come more often, at most 1; 0: all alike
    c.data.flip = 0.5  # probability
    c.data.crop_scale = config_dict.placeholder(tuple)  # (smallest, largest) share of the area; None: no cropping
    c.data.crop_ratio = 1.0  # how much wider or narrower than `size` a crop may be
    c.data.jitter = 0.0  # strength of random changes of the image's colours, at most 1
    c.data.max_corrupt = 0.001  # share of the training records that may be unreadable and are left out; 0: none
    c.data.latents = False  # encode the training images once; then nothing but flips is possible
    c.data.mask_draws = 0  # perturbations of each mask that are kept beside them, for colour; 0: a new one at each step
    c.data.num_workers = 0  # processes that decode; 0: threads

    c.codec = ConfigDict()
    c.codec.name = "patch"  # patch | kl | taesd | taesd3 | taef1 | taef2 | taesana
    c.codec.factor = 4  # side of a patch, for patch
    c.codec.whiten = 0.0  # evens out the spread of patches: 0 leaves it, 1 makes all directions alike, for patch
    c.codec.dtype = "float32"  # kl computes in it; bfloat16 on accelerators
    c.codec.path = ""  # weights, for the others; $VARIABLES expand; kl takes those of `init` where there is one

    c.mask_code = ConfigDict()
    c.mask_code.name = "colour"  # colour: the paper's pseudo-masks | linear: whitened one-hot patches | learned
    c.mask_code.palette = "spread"  # grid: the paper's colours | spread: far apart
    c.mask_code.pixel = 0.1  # amplitude of the perturbation per pixel and channel, as in the paper
    c.mask_code.region = 0.0  # amplitude of the perturbation per class of an image and channel
    c.mask_code.whiten = 0.5  # the same for linear
    c.mask_code.balance = "none"  # none (the paper's) | minmax: mask latents get the range of image latents, for colour
    c.mask_code.learned = ConfigDict()  # see learned_code.py; pixel and region are in units of the latents' spread
    c.mask_code.learned.encoder = "network"  # network | codec: the palette's colours through the image codec
    c.mask_code.learned.width = 64  # channels of its networks on the latent grid
    c.mask_code.learned.pixel_width = 16  # channels of a pixel
    c.mask_code.learned.blocks = 2  # residual blocks of each network on the latent grid
    c.mask_code.learned.noise = 0.5  # largest standard deviation of the noise it learns to bear, of the latents' spread
    c.mask_code.learned.smoothness = 0.1  # weight of differences between neighbouring latents
    c.mask_code.learned.noise_channels = 0  # of the codec's channels: nothing but noise, for synthesis to begin with
    c.mask_code.learned.steps = 600  # of its training, before that of the flow
    c.mask_code.learned.batch_size = 16
    c.mask_code.learned.crop = 64  # side of its training masks in pixels
    c.mask_code.learned.lr = 2e-3

    c.model = ConfigDict()  # see UNetConfig; channels follow from the codec
    c.model.block_out_channels = (32, 64, 96)
    c.model.layers_per_block = 1
    c.model.attention = (False, False, True)
    c.model.num_heads = (4, 4, 4)
    c.model.cross_attention_dim = config_dict.placeholder(int)
    c.model.linear_projection = False  # transformers begin and end as SD-2's; False: as SD-1's
    c.model.num_groups = 8
    c.model.skip = False  # v = F(zt, t) + (2t - 1) zt: for networks that start from nothing
    c.model.intervals = False  # the network is told how far its velocity will be followed: see shortcut.py
    c.model.remat = "none"  # none | blocks | full: computed again in the backward pass, to save memory
    c.model.dtype = "float32"  # computes; bfloat16 on accelerators
    c.model.param_dtype = "float32"  # stores

    c.loss = ConfigDict()
    c.loss.time_sampling = "uniform"  # uniform (the paper's) | logit_normal | mode | u_shaped
    c.loss.kind = "mse"  # mse (the paper's) | huber: errors beyond huber_delta count linearly
    c.loss.huber_delta = 1.0  # in units of the latents
    c.loss.image_weight = 0.7  # of the image's velocity, for symmflow
    c.loss.shortcut_every = 0  # each so many-th example of a batch learns jumps; 0: none
    c.loss.mask_void = True  # leave void pixels out of the loss

    c.reflow = ConfigDict()  # a rectified flow again (Liu et al. 2022), on pairs of the flow in `init`; see reflow.py
    c.reflow.share = 0.0  # of the examples whose z_0 is that flow's own, of their mask, in place of the image's
    c.reflow.steps = 25  # Euler's, from mask to z_0
    c.reflow.draws = 1  # perturbations, and so own z_0, of each mask

    c.optim = ConfigDict()
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"  # constant | linear | cosine, after the warm-up
    c.optim.warmup = 500
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.01
    c.optim.clip = 1.0  # of the gradient's global norm
    c.optim.ema = 0.999
    c.optim.accum_steps = 1  # slices of a batch that pass one after the other
    c.optim.flatten = False  # moments in one vector: compiles faster; with mesh.fsdp and mesh.tensor 1 only

    c.sampling = ConfigDict()
    c.sampling.solver = "euler"  # euler | adams | heun | midpoint | tsit5
    c.sampling.steps = 25

    c.eval = ConfigDict()
    c.eval.batch_size = 32
    c.eval.limit = 128  # validation images during training
    c.eval.limit_final = config_dict.placeholder(int)  # test images at the end; None: all
    c.eval.num_samples = 3  # synthesized images per mask
    c.eval.gallery = 8  # rows of the report's gallery

    c.log_every = 50
    c.eval_every = 1000
    c.checkpoint_every = 1000
    c.hang_seconds = 3600  # without a step end the process, for a launcher to start it again; 0: never
    return c.lock()
