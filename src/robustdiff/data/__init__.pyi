from .corruption import Corruption as Corruption
from .corruption import corrupt as corrupt
from .dataset import ImageDataset as ImageDataset
from .dataset import StreamedImages as StreamedImages
from .dataset import load_images as load_images
from .image_folder import write_dirty_copy as write_dirty_copy
from .sources.open import open_source as open_source
