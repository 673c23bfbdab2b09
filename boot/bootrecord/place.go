package bootrecord

import (
	"errors"
	"fmt"
	"io"

	"github.com/slotota/ota"
)

// place is where one copy is kept.
type place interface {
	// read returns what is stored, at least the record and at most MaxSize
	// bytes; nothing if there is nothing.
	read() ([]byte, error)
	// write replaces what is stored by rec, durably when it returns nil.
	write(rec []byte) error
	// tidy removes what an interrupted write has left beside the record.
	tidy()
}

// maxWriteSize bounds the write units of places, and so the memory for one.
const maxWriteSize = 1 << 20

// flashPlace keeps a copy at the start of a flash.
type flashPlace struct{ f ota.Flash }

// placeEnd returns the end of the smallest place for a copy in f from off on,
// which is the end of a write unit and of an erase unit.
func placeEnd(f ota.Flash, off int64) (int64, error) {
	ws := ota.WriteSize(f)
	if ws > maxWriteSize {
		return 0, fmt.Errorf("write units of %d bytes: at most %d: %w", ws, maxWriteSize, ota.ErrInvalid)
	}
	end, err := eraseEnd(f, off, roundUp(MaxSize, ws))
	if err == nil && end > f.Size() {
		err = fmt.Errorf("a flash of %d bytes: need %d: %w", f.Size(), end, ota.ErrInvalid)
	}
	return end, err
}

// eraseEnd returns the end of the erase units that hold the n bytes at off; that
// of the bytes if f needs no erasing.
func eraseEnd(f ota.Flash, off, n int64) (int64, error) {
	end := off + n
	e, ok := f.(ota.Eraser)
	if !ok {
		return end, nil
	}
	if size := e.EraseSize(); size <= 0 {
		return 0, fmt.Errorf("erase units of %d bytes: %w", size, ota.ErrInvalid)
	}
	for at := off; ; {
		if at >= f.Size() {
			return 0, fmt.Errorf("a flash of %d bytes: need %d: %w", f.Size(), end, ota.ErrInvalid)
		}
		start, size := ota.EraseUnit(f, at)
		if start != at || size <= 0 || size > f.Size()-at {
			return 0, fmt.Errorf("erase unit of %d bytes at %d: need one at %d, inside of %d bytes: %w", size, start, at, f.Size(), ota.ErrInvalid)
		}
		if at += size; at >= end {
			return at, nil
		}
	}
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

func (p *flashPlace) read() ([]byte, error) {
	b := make([]byte, MaxSize)
	n, err := p.f.ReadAt(b, 0)
	if n == len(b) {
		return b, nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return nil, err
}

func (p *flashPlace) write(rec []byte) error {
	n := roundUp(int64(len(rec)), ota.WriteSize(p.f))
	if e, ok := p.f.(ota.Eraser); ok {
		end, err := eraseEnd(p.f, 0, n)
		if err != nil {
			return err
		}
		if err := e.Erase(0, end); err != nil {
			return err
		}
	}
	b := make([]byte, n)
	for i := copy(b, rec); i < len(b); i++ {
		b[i] = ota.ErasedByte(p.f)
	}
	if k, err := p.f.WriteAt(b, 0); err != nil {
		return err
	} else if k != len(b) {
		return io.ErrShortWrite
	}
	return p.f.Sync()
}

func (p *flashPlace) tidy() {}

// Split divides f into places for the given number of copies, each in erase
// units of its own and none larger than needed; what is left at the end of f is
// not used. On media without erase units a place is MaxSize bytes long, or the
// next multiple of the write size. The layout depends on the geometry of f
// alone, so that copies can be added later.
func Split(f ota.Flash, copies int) ([]ota.Flash, error) {
	if f == nil {
		return nil, fmt.Errorf("bootrecord: no flash: %w", ota.ErrInvalid)
	}
	if copies < 2 || copies > MaxCopies {
		return nil, fmt.Errorf("bootrecord: %d copies: need 2 to %d: %w", copies, MaxCopies, ota.ErrInvalid)
	}
	var places []ota.Flash
	off := int64(0)
	for i := range copies {
		end, err := placeEnd(f, off)
		if err != nil {
			return nil, fmt.Errorf("bootrecord: copy %d: %w", i, err)
		}
		r, err := ota.Region(f, off, end-off)
		if err != nil {
			return nil, fmt.Errorf("bootrecord: copy %d: %w", i, err)
		}
		places = append(places, r)
		off = end
	}
	return places, nil
}
