package mcuboot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/slotota/ota"
)

// Flag is the state of a flag or of the magic in a trailer.
type Flag uint8

// The states.
const (
	Unset Flag = iota // erased
	Set               // or, of the magic, good
	Bad               // anything else
)

// String returns a word for the state.
func (f Flag) String() string { return [...]string{"unset", "set", "bad"}[min(f, Bad)] }

// SwapType is what the loader does at the next boot, in the swap modes.
type SwapType uint8

// The types, as stored in a trailer.
const (
	SwapNone   SwapType = 1
	SwapTest   SwapType = 2 // exchange the slots, and back unless confirmed
	SwapPerm   SwapType = 3 // exchange the slots for good
	SwapRevert SwapType = 4 // exchange them back
)

// String returns a word for the type.
func (s SwapType) String() string {
	switch s {
	case SwapNone:
		return "none"
	case SwapTest:
		return "test"
	case SwapPerm:
		return "perm"
	case SwapRevert:
		return "revert"
	}
	return fmt.Sprintf("unknown (%d)", uint8(s))
}

// TrailerState is what a trailer says: struct boot_swap_state.
type TrailerState struct {
	Magic    Flag
	CopyDone Flag // the loader has selected, or moved, the image
	ImageOK  Flag // the image is confirmed
	SwapType SwapType
	ImageNum uint8
}

// NextSwap returns what a loader in a swap mode does at the next boot
// (mcu-tools/mcuboot, boot/bootutil/src/bootutil_public.c, boot_swap_tables).
func NextSwap(primary, secondary TrailerState) SwapType {
	switch {
	case secondary.Magic == Set && secondary.ImageOK == Unset:
		return SwapTest
	case secondary.Magic == Set && secondary.ImageOK == Set:
		return SwapPerm
	case primary.Magic == Set && secondary.Magic == Unset && primary.ImageOK == Unset && primary.CopyDone == Set:
		return SwapRevert
	}
	return SwapNone
}

// maxAlign bounds BOOT_MAX_ALIGN.
const maxAlign = 32

const magicSize = 16

// Trailer is the end of a slot, where firmware and loader leave messages:
//
//	… swap size | swap info | copy done | image ok | magic
//
// each aligned to BOOT_MAX_ALIGN bytes, the magic to the very end (mcu-tools/mcuboot,
// docs/design.md, "Image trailer"). It is not safe for concurrent use.
type Trailer struct {
	f      ota.Flash
	align  int64
	erased byte
}

// NewTrailer returns the trailer of a slot. align is the loader's BOOT_MAX_ALIGN,
// a power of two up to 32, and no less than the write unit of slot; less than 8
// means 8, as in the loader. Errors wrap [ota.ErrInvalid].
func NewTrailer(slot ota.Flash, align int) (*Trailer, error) {
	if align < 1 || align > maxAlign || align&(align-1) != 0 {
		return nil, fmt.Errorf("mcuboot: alignment %d: %w", align, ota.ErrInvalid)
	}
	t := &Trailer{f: slot, align: int64(max(align, 8)), erased: ota.ErasedByte(slot)}
	if w := ota.WriteSize(slot); t.align%w != 0 || slot.Size()%t.align != 0 || slot.Size() < 16*maxAlign {
		return nil, fmt.Errorf("mcuboot: alignment %d, write unit %d, slot of %d bytes: %w", align, w, slot.Size(), ota.ErrInvalid)
	}
	return t, nil
}

func (t *Trailer) imageOK() int64 {
	off := t.f.Size() - magicSize - t.align
	return off - off%t.align
}
func (t *Trailer) copyDone() int64 { return t.imageOK() - t.align }
func (t *Trailer) swapInfo() int64 { return t.copyDone() - t.align }
func (t *Trailer) swapSize() int64 { return t.swapInfo() - t.align }

// Start returns where the erase unit begins that holds the fields of the trailer:
// an image that ends before it survives that they are erased. In the swap modes
// the loader needs more room, which depends on the number of sectors.
func (t *Trailer) Start() int64 {
	if start, n := ota.EraseUnit(t.f, t.swapSize()); n > 0 {
		return start
	}
	return t.swapSize()
}

// magic returns the magic, with what stands before it in its write unit.
func (t *Trailer) magic() []byte {
	m := []byte{0x77, 0xc2, 0x95, 0xf3, 0x60, 0xd2, 0xef, 0x7f, 0x35, 0x52, 0x50, 0x0f, 0x2c, 0xb6, 0x79, 0x80}
	if t.align > 8 {
		m = append([]byte{byte(t.align), 0}, 0x2d, 0xe1, 0x5d, 0x29, 0x41, 0x0b, 0x8d, 0x77, 0x67, 0x9c, 0x11, 0x0f, 0x1f, 0x8a)
	}
	return append(bytes.Repeat([]byte{t.erased}, int(max(t.align, magicSize))-magicSize), m...)
}

// Read returns what the trailer says.
func (t *Trailer) Read(ctx context.Context) (s TrailerState, err error) {
	if err := ctx.Err(); err != nil {
		return s, err
	}
	start := t.swapInfo()
	b := make([]byte, t.f.Size()-start)
	if n, err := t.f.ReadAt(b, start); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return s, fmt.Errorf("mcuboot: trailer: %w", err)
	}
	flag := func(c byte) Flag {
		switch c {
		case t.erased:
			return Unset
		case 1:
			return Set
		}
		return Bad
	}
	s = TrailerState{Magic: Bad, SwapType: SwapNone}
	switch m := b[len(b)-magicSize:]; {
	case bytes.HasSuffix(t.magic(), m):
		s.Magic = Set
	case bytes.Count(m, []byte{t.erased}) == magicSize:
		s.Magic = Unset
	}
	s.CopyDone, s.ImageOK = flag(b[t.copyDone()-start]), flag(b[t.imageOK()-start])
	if info := b[0]; info != t.erased && info&15 <= byte(SwapRevert) {
		s.SwapType, s.ImageNum = SwapType(info&15), info>>4
	}
	return s, nil
}

// blank reports whether all fields are erased.
func (t *Trailer) blank() (bool, error) {
	b := make([]byte, t.f.Size()-t.swapSize())
	if n, err := t.f.ReadAt(b, t.swapSize()); n < len(b) {
		return false, fmt.Errorf("mcuboot: trailer: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	return bytes.Count(b, []byte{t.erased}) == len(b), nil
}

// Erase erases the trailer, and what else is in its erase units; see
// [Trailer.Start]. It does nothing if all fields are erased.
func (t *Trailer) Erase() error {
	if ok, err := t.blank(); ok || err != nil {
		return err
	}
	start := t.Start()
	n := t.f.Size() - start
	var err error
	if e, ok := t.f.(ota.Eraser); ok {
		err = e.Erase(start, n)
	} else {
		_, err = t.f.WriteAt(bytes.Repeat([]byte{t.erased}, int(n)), start)
	}
	if err == nil {
		err = t.f.Sync()
	}
	if err != nil {
		return fmt.Errorf("mcuboot: erasing the trailer: %w", err)
	}
	if ok, err := t.blank(); !ok {
		return fmt.Errorf("mcuboot: erasing the trailer: %w", errors.Join(err, ota.ErrVerify))
	}
	return nil
}

// program writes to a field that is erased, as one operation, and reads it back.
func (t *Trailer) program(off int64, b []byte) error {
	if pad := int(ota.WriteSize(t.f)) - len(b); pad > 0 {
		b = append(b, bytes.Repeat([]byte{t.erased}, pad)...)
	}
	_, err := t.f.WriteAt(b, off)
	if err == nil {
		err = t.f.Sync()
	}
	got := make([]byte, len(b))
	if err == nil {
		if n, rerr := t.f.ReadAt(got, off); n < len(got) {
			err = errors.Join(rerr, io.ErrUnexpectedEOF)
		} else if !bytes.Equal(got, b) {
			err = ota.ErrVerify
		}
	}
	if err != nil {
		return fmt.Errorf("mcuboot: trailer: byte %d: %w", off, err)
	}
	return nil
}

func (t *Trailer) writeMagic() error {
	m := t.magic()
	if w := ota.WriteSize(t.f); int64(len(m))%w != 0 {
		return fmt.Errorf("mcuboot: write unit %d: %w", w, ota.ErrInvalid)
	}
	return t.program(t.f.Size()-int64(len(m)), m)
}

// write erases the trailer and writes the given flags, and the magic last.
func (t *Trailer) write(swapInfo byte, copyDone, imageOK bool) error {
	if err := t.Erase(); err != nil {
		return err
	}
	for _, f := range []struct {
		on  bool
		off int64
		v   byte
	}{{swapInfo != 0, t.swapInfo(), swapInfo}, {copyDone, t.copyDone(), 1}, {imageOK, t.imageOK(), 1}} {
		if f.on {
			if err := t.program(f.off, []byte{f.v}); err != nil {
				return err
			}
		}
	}
	return t.writeMagic()
}

// SetPending asks a loader in a swap mode to exchange the slots at the next boot:
// to try the image in this, the secondary, slot, or to keep it for good if
// permanent is true. The magic is written last, so that a power cut leaves the
// request complete or not made. A request that is there already is kept if it is
// the same, and replaced otherwise, which is not atomic: a power cut leaves none.
// image is the number of the image, at most 15, where a loader manages several.
func (t *Trailer) SetPending(ctx context.Context, permanent bool, image uint8) error {
	if image > 15 {
		return fmt.Errorf("mcuboot: image %d: %w", image, ota.ErrInvalid)
	}
	s, err := t.Read(ctx)
	if err != nil {
		return err
	}
	want := Unset
	typ := SwapTest
	if permanent {
		want, typ = Set, SwapPerm
	}
	if s.Magic == Set && s.ImageOK == want && s.CopyDone == Unset {
		return nil
	}
	return t.write(image<<4|byte(typ), false, permanent)
}

// Confirm declares good the image in this slot, the primary one in the swap modes.
// It does nothing if that is so already, or if the trailer has no magic: the image
// was not on trial then. It is one program operation. The error wraps
// [ErrTrailer] if the flag holds something else.
func (t *Trailer) Confirm(ctx context.Context) error {
	s, err := t.Read(ctx)
	switch {
	case err != nil:
		return err
	case s.Magic != Set || s.ImageOK == Set:
		return nil
	case s.ImageOK == Bad:
		return fmt.Errorf("mcuboot: image_ok is neither set nor erased: %w", ErrTrailer)
	}
	return t.program(t.imageOK(), []byte{1})
}

// revoke makes sure that a trial which has begun is not confirmed. One bit is
// programmed, so that a write that was cut off cannot be a confirmation.
func (t *Trailer) revoke() error { return t.program(t.imageOK(), []byte{t.erased ^ 2}) }
