package mcuboot

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/slotota/ota"
)

// Errors of this package, wrapped with what and where.
var (
	// ErrImage says that an image is malformed or damaged.
	ErrImage = errors.New("bad MCUboot image")
	// ErrTrailer says that a trailer is in a state that does not allow an
	// operation.
	ErrTrailer = errors.New("the MCUboot trailer does not allow that")
)

// Version is that of an image: struct image_version.
type Version struct {
	Major, Minor uint8
	Revision     uint16
	Build        uint32
}

// String returns the form major.minor.revision+build.
func (v Version) String() string {
	return fmt.Sprintf("%d.%d.%d+%d", v.Major, v.Minor, v.Revision, v.Build)
}

// Compare returns -1, 0 or 1. Loaders compare the build number only if built with
// MCUBOOT_VERSION_CMP_USE_BUILD_NUMBER.
func (v Version) Compare(w Version, build bool) int {
	c := cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Revision, w.Revision))
	if c == 0 && build {
		c = cmp.Compare(v.Build, w.Build)
	}
	return c
}

func (v Version) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint16(append(b, v.Major, v.Minor), v.Revision)
	return binary.LittleEndian.AppendUint32(b, v.Build)
}

func parseVersion(b []byte) Version {
	return Version{b[0], b[1], binary.LittleEndian.Uint16(b[2:]), binary.LittleEndian.Uint32(b[4:])}
}

// Flags of a [Header].
const (
	FlagPIC         = 0x0001
	FlagAES128      = 0x0004 // the payload is encrypted
	FlagAES256      = 0x0008
	FlagNonBootable = 0x0010
	FlagRAMLoad     = 0x0020
	FlagROMFixed    = 0x0100 // LoadAddr is where the image must lie

	flagsOpaque = FlagAES128 | FlagAES256 | 0x0e00 // encrypted or compressed
)

// HeaderSize is the number of bytes of a [Header]; the payload starts at
// Header.HeaderSize, which is mostly more.
const HeaderSize = 32

const imageMagic = 0x96f3b83d

// Header is the start of an image: struct image_header, little-endian
// (mcu-tools/mcuboot, boot/bootutil/include/bootutil/image.h).
type Header struct {
	LoadAddr      uint32
	HeaderSize    uint16 // bytes from the start of the image to its payload
	ProtectedSize uint16 // bytes of the protected area behind the payload
	ImageSize     uint32 // bytes of the payload
	Flags         uint32
	Version       Version
}

// ParseHeader reads a header from the first HeaderSize bytes of b. Errors wrap
// [ErrImage].
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, fmt.Errorf("mcuboot: header of %d bytes: %w", len(b), ErrImage)
	}
	le := binary.LittleEndian
	h := Header{
		LoadAddr: le.Uint32(b[4:]), HeaderSize: le.Uint16(b[8:]), ProtectedSize: le.Uint16(b[10:]),
		ImageSize: le.Uint32(b[12:]), Flags: le.Uint32(b[16:]), Version: parseVersion(b[20:]),
	}
	switch {
	case le.Uint32(b) != imageMagic:
		return h, fmt.Errorf("mcuboot: magic number %#08x: %w", le.Uint32(b), ErrImage)
	case h.HeaderSize < HeaderSize:
		return h, fmt.Errorf("mcuboot: the payload starts at byte %d: %w", h.HeaderSize, ErrImage)
	case h.hashed() > 1<<32-1:
		return h, fmt.Errorf("mcuboot: payload of %d bytes: %w", h.ImageSize, ErrImage)
	}
	return h, nil
}

// Bytes returns the HeaderSize bytes of h.
func (h Header) Bytes() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(make([]byte, 0, HeaderSize), imageMagic)
	b = le.AppendUint32(b, h.LoadAddr)
	b = le.AppendUint16(b, h.HeaderSize)
	b = le.AppendUint16(b, h.ProtectedSize)
	b = le.AppendUint32(b, h.ImageSize)
	b = le.AppendUint32(b, h.Flags)
	return le.AppendUint32(h.Version.append(b), 0)
}

// hashed is how many bytes of the image the hash covers.
func (h Header) hashed() int64 {
	return int64(h.HeaderSize) + int64(h.ImageSize) + int64(h.ProtectedSize)
}

// Types of TLVs, the fields behind the payload.
const (
	TLVKeyHash    = 0x01
	TLVSHA256     = 0x10
	TLVECDSA      = 0x22
	TLVEd25519    = 0x24
	TLVSigPure    = 0x25
	TLVDependency = 0x40
	TLVSecCounter = 0x50

	tlvMagic     = 0x6907
	tlvProtected = 0x6908
)

// TLV is a field behind the payload.
type TLV struct {
	Type      uint16
	Protected bool // covered by the hash and so by the signature
	Value     []byte
}

// Dependency says that an image needs another one: struct image_dependency.
type Dependency struct {
	Image uint8   // number of the other image
	Min   Version // its lowest version
}

// Satisfied reports whether version v is enough, compared as loaders do.
func (d Dependency) Satisfied(v Version, build bool) bool { return v.Compare(d.Min, build) >= 0 }

// Image describes an image that was verified.
type Image struct {
	Header Header
	// Size is the number of bytes of the image, TLVs included. A trailer may be
	// at the end of the slot.
	Size   int64
	SHA256 [32]byte
	TLVs   []TLV
	// Key is the key that signed the image, nil if none did.
	Key crypto.PublicKey
	// Dependencies and SecurityCounter are from the protected area; Counted
	// says whether there is a counter.
	Dependencies    []Dependency
	SecurityCounter uint32
	Counted         bool
}

// VerifyOptions configure [VerifyImage].
type VerifyOptions struct {
	// Keys may sign images: *ecdsa.PublicKey on P-256, or ed25519.PublicKey.
	Keys []crypto.PublicKey
	// AllowUnsigned accepts images by their hash alone if there are no Keys.
	AllowUnsigned bool
}

// maxTLVs bounds the fields of an image.
const maxTLVs = 256

// VerifyImage reads an image at the start of r, of which at most size bytes belong
// to it, and checks structure, hash and signature. It needs no more than 200 KiB of
// memory. Errors wrap [ErrImage], [ota.ErrUnverified] if no known key signed it,
// [ota.ErrUnsupported] for encrypted and compressed images and for signatures that
// are not over the hash (SIG_PURE), or are those of r or ctx.
func VerifyImage(ctx context.Context, r io.ReaderAt, size int64, o *VerifyOptions) (*Image, error) {
	if o == nil {
		o = &VerifyOptions{}
	}
	if len(o.Keys) == 0 && !o.AllowUnsigned {
		return nil, fmt.Errorf("mcuboot: no keys: %w", ota.ErrUnverified)
	}
	hashes, err := keyHashes(o.Keys)
	if err != nil {
		return nil, err
	}
	s := io.NewSectionReader(r, 0, max(size, 0))
	b := make([]byte, HeaderSize)
	if err := readFull(s, b, 0); err != nil {
		return nil, err
	}
	img := &Image{}
	if img.Header, err = ParseHeader(b); err != nil {
		return nil, err
	}
	h := img.Header
	if h.Flags&flagsOpaque != 0 {
		return nil, fmt.Errorf("mcuboot: encrypted or compressed (flags %#x): %w", h.Flags, ota.ErrUnsupported)
	}
	if h.hashed() > s.Size() {
		return nil, fmt.Errorf("mcuboot: %d bytes and more in %d: %w", h.hashed(), s.Size(), ErrImage)
	}
	if img.SHA256, err = hashOf(ctx, s, h.hashed()); err != nil {
		return nil, err
	}
	if err := img.readTLVs(s); err != nil {
		return nil, err
	}
	return img, img.check(o, hashes)
}

// keyHashes returns the KEYHASH of each key.
func keyHashes(keys []crypto.PublicKey) (hs [][32]byte, err error) {
	for i, k := range keys {
		switch k := k.(type) {
		case ed25519.PublicKey:
		case *ecdsa.PublicKey:
			if k == nil || k.Curve != elliptic.P256() {
				return nil, fmt.Errorf("mcuboot: key %d: not on P-256: %w", i, ota.ErrInvalid)
			}
		default:
			return nil, fmt.Errorf("mcuboot: key %d: %T: %w", i, k, ota.ErrInvalid)
		}
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, fmt.Errorf("mcuboot: key %d: %w: %w", i, err, ota.ErrInvalid)
		}
		hs = append(hs, sha256.Sum256(der))
	}
	return hs, nil
}

func hashOf(ctx context.Context, r io.ReaderAt, n int64) (sum [32]byte, err error) {
	h := sha256.New()
	buf := make([]byte, 16<<10)
	for off := int64(0); off < n; off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return sum, err
		}
		b := buf[:min(int64(len(buf)), n-off)]
		if err := readFull(r, b, off); err != nil {
			return sum, err
		}
		h.Write(b)
	}
	return [32]byte(h.Sum(nil)), nil
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	switch {
	case n == len(b):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return fmt.Errorf("mcuboot: the image ends at byte %d: %w", off+int64(n), ErrImage)
	}
	return fmt.Errorf("mcuboot: %w", err)
}

// readTLVs reads the protected area, which must be as long as the header says, and
// the other one.
func (img *Image) readTLVs(s *io.SectionReader) error {
	off := int64(img.Header.HeaderSize) + int64(img.Header.ImageSize)
	area := func(magic uint16, protected bool) error {
		b := make([]byte, 4)
		if err := readFull(s, b, off); err != nil {
			return err
		}
		total := binary.LittleEndian.Uint16(b[2:])
		switch {
		case binary.LittleEndian.Uint16(b) != magic:
			return fmt.Errorf("mcuboot: magic number %#04x at byte %d: %w", binary.LittleEndian.Uint16(b), off, ErrImage)
		case total < 4 || protected && total != img.Header.ProtectedSize:
			return fmt.Errorf("mcuboot: area of %d bytes at byte %d: %w", total, off, ErrImage)
		}
		b = make([]byte, total-4)
		if err := readFull(s, b, off+4); err != nil {
			return err
		}
		for len(b) > 0 {
			if len(b) < 4 || len(img.TLVs) == maxTLVs {
				return fmt.Errorf("mcuboot: too many fields at byte %d: %w", off, ErrImage)
			}
			typ, n := binary.LittleEndian.Uint16(b), int(binary.LittleEndian.Uint16(b[2:]))
			if n > len(b)-4 {
				return fmt.Errorf("mcuboot: field %#x of %d bytes in an area of %d: %w", typ, n, total, ErrImage)
			}
			img.TLVs = append(img.TLVs, TLV{typ, protected, bytes.Clone(b[4 : 4+n])})
			b = b[4+n:]
		}
		off += int64(total)
		return nil
	}
	if img.Header.ProtectedSize > 0 {
		if err := area(tlvProtected, true); err != nil {
			return err
		}
	}
	err := area(tlvMagic, false)
	img.Size = off
	return err
}

// check holds the fields against the hash and the keys.
func (img *Image) check(o *VerifyOptions, hashes [][32]byte) error {
	hashed := false
	key := -1 // that of the signature which follows
	for _, t := range img.TLVs {
		bad := fmt.Errorf("mcuboot: field %#x of %d bytes: %w", t.Type, len(t.Value), ErrImage)
		switch t.Type {
		case TLVSHA256:
			if !bytes.Equal(t.Value, img.SHA256[:]) {
				return fmt.Errorf("mcuboot: the hash does not match: %w: %w", ota.ErrDigest, ErrImage)
			}
			hashed = true
		case TLVKeyHash:
			key = -1
			for i := range hashes {
				if bytes.Equal(t.Value, hashes[i][:]) {
					key = i
				}
			}
		case TLVSigPure:
			return fmt.Errorf("mcuboot: a signature of the image instead of its hash: %w", ota.ErrUnsupported)
		case TLVECDSA, TLVEd25519:
			if key < 0 {
				continue // of somebody else
			}
			if !verify(o.Keys[key], t, img.SHA256[:]) {
				return fmt.Errorf("mcuboot: the signature does not match: %w: %w", ota.ErrUnverified, ErrImage)
			}
			img.Key = o.Keys[key]
			key = -1
		case TLVDependency:
			if !t.Protected {
				continue // nobody has signed it
			}
			if len(t.Value) != 12 {
				return bad
			}
			img.Dependencies = append(img.Dependencies, Dependency{t.Value[0], parseVersion(t.Value[4:])})
		case TLVSecCounter:
			if !t.Protected {
				continue
			}
			if len(t.Value) != 4 || img.Counted {
				return bad
			}
			img.SecurityCounter, img.Counted = binary.LittleEndian.Uint32(t.Value), true
		}
	}
	switch {
	case !hashed:
		return fmt.Errorf("mcuboot: no SHA-256 hash: %w", ErrImage)
	case img.Key == nil && len(o.Keys) > 0:
		return fmt.Errorf("mcuboot: no signature by a known key: %w", ota.ErrUnverified)
	}
	return nil
}

func verify(key crypto.PublicKey, t TLV, digest []byte) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return t.Type == TLVECDSA && ecdsa.VerifyASN1(k, digest, t.Value)
	case ed25519.PublicKey:
		return t.Type == TLVEd25519 && len(k) == ed25519.PublicKeySize && ed25519.Verify(k, digest, t.Value)
	}
	return false
}
