"""Accepted image formats: their names in Pillow, endings of file names, and first bytes."""

# Each further decoder is one more that hostile bytes can reach.
ENDINGS_BY_FORMAT = {
    "JPEG": ("jpg", "jpeg", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif"),
}
FORMATS = tuple(ENDINGS_BY_FORMAT)
# lower case; of several images of one sample the first of these is taken
IMAGE_ENDINGS = tuple(ending for endings in ENDINGS_BY_FORMAT.values() for ending in endings)
MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
FIRST_BOXES = (b"ftypavif", b"ftypheic", b"ftypheix", b"ftypmif1")  # of AVIF and HEIF, from byte 4 on
