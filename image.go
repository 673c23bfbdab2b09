package ota

import (
	"context"
	"io"
)

// Image is a firmware to be installed: a description, then the data of its
// parts, read once and in order. *bundle.Reader is one.
type Image interface {
	// Info describes the image. Everything in it was authenticated by the
	// time the Image was made.
	Info() ImageInfo
	// Next returns the next part that has data, or io.EOF after the last one,
	// when the whole image has been read and found well-formed. It may be
	// called before the data of the previous part was read to its end. Next
	// and the readers it returns give up when ctx is done.
	Next(ctx context.Context) (*ImagePart, error)
}

// ImageInfo describes an image.
type ImageInfo struct {
	Name     string // product, as in the manifest
	Platform string // hardware, compared for equality
	Version  string // for people; says nothing about order
	BuildID  string // tells builds of the same version apart
	// Security is the security version: a number that grows when older
	// firmware must not be installed any more.
	Security uint64
	// SecurityStep is by how much Security may exceed the floor that the device
	// has stored, as those who signed the image bind themselves; 0 means no
	// bound. That of [Options] holds beside it.
	SecurityStep uint64
	// Parts lists every part that the image holds, in no particular order.
	Parts []PartInfo
	// SignedBy names the keys whose signatures were verified.
	SignedBy []string
	// Unsigned says that whoever opened the image allowed it, by name, to be
	// unauthenticated. An image that neither is signed nor says so is refused.
	Unsigned bool
	// Size is the number of bytes of the whole image file, 0 if not known.
	Size int64
}

// PartInfo describes a part of an image.
type PartInfo struct {
	Name string
	// Size is the number of bytes that are installed.
	Size int64
	// SHA256 is the digest of those bytes, or nil in images of old formats
	// that carry none.
	SHA256 *[32]byte
	// Chunks has the digests of the pieces of those bytes, or is nil if the
	// image has none. They are as authentic as SHA256.
	Chunks *Chunks
}

// Chunks are the digests of consecutive pieces of a part: Size bytes each, the
// last one maybe shorter. With them a piece is checked before it is written,
// and one that is in place already needs neither be read nor written. A part that
// has them must have a SHA256 too.
type Chunks struct {
	Size   int64 // bytes, from 1 to MaxChunk
	SHA256 [][32]byte
}

// MaxChunk bounds the size of a chunk, because one is kept in memory until it is
// checked.
const MaxChunk = 4 << 20

// valid reports whether c describes size bytes.
func (c *Chunks) valid(size int64) bool {
	if c.Size <= 0 || c.Size > MaxChunk {
		return false
	}
	n := size / c.Size
	if size%c.Size > 0 {
		n++
	}
	return int64(len(c.SHA256)) == n
}

// end returns where chunk i of size bytes ends.
func (c *Chunks) end(i, size int64) int64 { return min((i+1)*c.Size, size) }

// Range is a run of bytes.
type Range struct{ Off, Len int64 }

// Selector is an optional interface of [ImagePart].Data whose source need not
// be read in full, such as a file or a server that takes range requests.
//
// Select is called once at most, before the first Read, with the bytes of the
// part that are wanted: ascending ranges, none empty, that neither overlap nor
// touch, and that begin and end on borders of chunks or at the end of the part.
// Read then yields these bytes only, one range after another, and io.EOF. With
// no ranges at all the part is passed over.
type Selector interface {
	Select(wanted []Range) error
}

// Downloader is an optional interface of an [Image] that comes over a network.
type Downloader interface {
	// Downloaded returns how many bytes were fetched so far. It is safe for
	// concurrent use and does not wait.
	Downloaded() int64
}

// ImagePart is a part of an image with its data.
type ImagePart struct {
	PartInfo
	// Data yields Size bytes and then io.EOF. [Device.Update] checks the
	// length and SHA256 itself; the final read reports whatever the format
	// checks beside them.
	Data io.Reader
}

// part returns the description of the named part, or nil.
func (i *ImageInfo) part(name string) *PartInfo {
	for k := range i.Parts {
		if i.Parts[k].Name == name {
			return &i.Parts[k]
		}
	}
	return nil
}
