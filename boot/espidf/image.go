package espidf

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/slotota/ota"
)

// Chip is the number of a chip in an image header: esp_chip_id_t.
type Chip uint16

// The chips.
const (
	ESP32   Chip = 0x0000
	ESP32S2 Chip = 0x0002
	ESP32C3 Chip = 0x0005
	ESP32S3 Chip = 0x0009
	ESP32C2 Chip = 0x000c
	ESP32C6 Chip = 0x000d
	ESP32H2 Chip = 0x0010
	ESP32P4 Chip = 0x0012
)

// Segment is a part of an image that is loaded or mapped.
type Segment struct {
	Addr   uint32 // where it goes in the address space
	Offset int64  // of its data in the image
	Size   uint32 // bytes
}

// Image describes an application image that was verified.
type Image struct {
	Chip     Chip
	Entry    uint32 // where it starts to execute
	Segments []Segment
	// Size is the number of bytes of the image with checksum and digest; a
	// signature may follow.
	Size int64
	// SHA256 is the digest appended to the image, nil if there is none. It
	// protects against damage only.
	SHA256 *[32]byte
	// App describes the application, nil if the image does not.
	App *App
}

// App is the description in an image: esp_app_desc_t.
type App struct {
	// SecureVersion is what the loader's anti-rollback check compares; it fits
	// the security version of a bundle.
	SecureVersion uint32
	Version       string
	Project       string
	Time, Date    string // of the build
	IDF           string // version of ESP-IDF
	ELFSHA256     [32]byte
}

const (
	headerSize  = 24
	maxSegments = 16
	appMagic    = 0xabcd5432
	appSize     = 256
)

// VerifyImage reads an application image at the start of r, of which at most size
// bytes belong to it, and checks all that the loader checks before it starts one,
// signatures aside: structure, checksum and digest (espressif/esp-idf,
// components/bootloader_support/src/esp_image_format.c). It needs 4 KiB of memory.
// Errors wrap [ErrImage], or are those of r or ctx.
func VerifyImage(ctx context.Context, r io.ReaderAt, size int64) (*Image, error) {
	v := &verifier{ctx: ctx, r: io.NewSectionReader(r, 0, max(size, 0)), sum: sha256.New(), xor: 0xef}
	img, err := v.image()
	if err != nil {
		return nil, fmt.Errorf("espidf: image: at byte %d: %w", v.off, err)
	}
	return img, nil
}

// verifier reads an image once, from its start to its end.
type verifier struct {
	ctx context.Context
	r   io.Reader
	off int64
	sum hash.Hash
	xor byte
	buf [4096]byte
}

// next reads the n bytes that follow, at most a buffer full.
func (v *verifier) next(n int) ([]byte, error) {
	if err := v.ctx.Err(); err != nil {
		return nil, err
	}
	b := v.buf[:n]
	if _, err := io.ReadFull(v.r, b); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("it is cut off: %w", ErrImage)
		}
		return nil, err
	}
	v.off += int64(n)
	v.sum.Write(b)
	return b, nil
}

func (v *verifier) image() (*Image, error) {
	h, err := v.next(headerSize)
	if err != nil {
		return nil, err
	}
	segments, hashed := int(h[1]), h[23]
	img := &Image{Entry: binary.LittleEndian.Uint32(h[4:]), Chip: Chip(binary.LittleEndian.Uint16(h[12:]))}
	switch {
	case h[0] != 0xe9:
		return nil, fmt.Errorf("magic number %#02x: %w", h[0], ErrImage)
	case segments == 0 || segments > maxSegments:
		return nil, fmt.Errorf("%d segments: %w", segments, ErrImage)
	case hashed > 1:
		return nil, fmt.Errorf("hash_appended is %d: %w", hashed, ErrImage)
	}
	for i := range segments {
		h, err := v.next(8)
		if err != nil {
			return nil, err
		}
		s := Segment{Addr: binary.LittleEndian.Uint32(h), Size: binary.LittleEndian.Uint32(h[4:]), Offset: v.off}
		if s.Size%4 != 0 || s.Size > 1<<24 {
			return nil, fmt.Errorf("segment %d has %d bytes: %w", i, s.Size, ErrImage)
		}
		img.Segments = append(img.Segments, s)
		for rest := s.Size; rest > 0; {
			b, err := v.next(int(min(rest, uint32(len(v.buf)))))
			if err != nil {
				return nil, err
			}
			for _, c := range b {
				v.xor ^= c
			}
			if i == 0 && rest == s.Size {
				img.App = parseApp(b)
			}
			rest -= uint32(len(b))
		}
	}
	// Zeros, so that the checksum ends a block of 16 bytes.
	b, err := v.next(int(16 - v.off%16))
	if err != nil {
		return nil, err
	}
	if b[len(b)-1] != v.xor {
		return nil, fmt.Errorf("the checksum is %#02x, not %#02x: %w", v.xor, b[len(b)-1], ErrImage)
	}
	if hashed == 1 {
		sum := v.sum.Sum(nil)
		b, err := v.next(len(sum))
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(sum, b) {
			return nil, fmt.Errorf("the SHA-256 digest does not match: %w: %w", ota.ErrDigest, ErrImage)
		}
		img.SHA256 = (*[32]byte)(sum)
	}
	img.Size = v.off
	return img, nil
}

// parseApp reads the description at the start of the first segment, nil if there
// is none.
func parseApp(b []byte) *App {
	if len(b) < appSize || binary.LittleEndian.Uint32(b) != appMagic {
		return nil
	}
	text := func(from, n int) string {
		s, _, _ := bytes.Cut(b[from:from+n], []byte{0})
		return string(s)
	}
	a := &App{
		SecureVersion: binary.LittleEndian.Uint32(b[4:]),
		Version:       text(16, 32), Project: text(48, 32),
		Time: text(80, 16), Date: text(96, 16), IDF: text(112, 32),
	}
	copy(a.ELFSHA256[:], b[144:])
	return a
}
