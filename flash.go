package ota

import (
	"errors"
	"fmt"
	"io"
)

// Flash is a region of storage: one part of a slot, or the place of a boot
// record. Implementations live under flash/; [github.com/slotota/ota/flashtest]
// checks any of them.
//
// ReadAt is safe for concurrent use, also beside a WriteAt to other bytes. A
// WriteAt may be torn or lost by a power cut until Sync has returned nil. After
// a failed Sync nothing written since the last good one is known to be on the
// medium. Every method reports failures; none may retry without bound.
//
// A region that must be erased before it is written also implements [Eraser].
type Flash interface {
	io.ReaderAt
	io.WriterAt
	// Size is the length of the region in bytes; it never changes.
	Size() int64
	// Sync makes everything written and erased so far durable.
	Sync() error
}

// Eraser is an optional interface of a [Flash] whose bytes must be erased
// before they are written (NOR, NAND). Each write unit is then written at most
// once between two erasures.
type Eraser interface {
	// EraseSize is the size of one erase unit in bytes. Media with units of
	// several sizes return the largest and implement [UnitEraser] too.
	EraseSize() int64
	// Erase erases [off, off+n), which must begin and end on unit boundaries.
	// Erased bytes read as ErasedByte. Like a write, it is durable after Sync.
	Erase(off, n int64) error
}

// UnitEraser is an optional interface of an [Eraser] with erase units of
// different sizes, or with a short last one.
type UnitEraser interface {
	// EraseUnit returns start and length of the erase unit that holds off.
	EraseUnit(off int64) (start, n int64)
}

// WriteSizer is an optional interface of a [Flash] that can only be written in
// aligned units, each written whole: WriteAt then gets offsets and lengths that
// are multiples of WriteSize (the program unit of NOR and NAND).
type WriteSizer interface {
	WriteSize() int64
}

// ErasedByter is an optional interface of an [Eraser] whose erased bytes are
// not 0xFF.
type ErasedByter interface {
	ErasedByte() byte
}

// DirectReader is an optional interface of a [Flash] whose ReadAt may be answered
// from memory, such as the page cache of an operating system.
type DirectReader interface {
	// DirectReader returns a reader of the same bytes that asks the medium. It
	// sees what WriteAt has written as soon as that has returned, before Sync,
	// and is as safe for concurrent use as ReadAt. It is fastest with memory,
	// offsets and lengths aligned to 4096. It returns nil if there is no such
	// reader; then, after a successful Sync, ReadAt should ask the medium.
	DirectReader() io.ReaderAt
}

// Zeroer is an optional interface of a [Flash] that can make bytes zero for less
// than it costs to write them.
type Zeroer interface {
	// Zero makes the n bytes at off read as zeros; like a write, it is durable
	// after Sync. An error that wraps ErrUnsupported says that nothing was done
	// and that zeros have to be written.
	Zero(off, n int64) error
}

// SequentialWriter is an optional interface of a [Flash] that is written from its
// beginning on, each byte after the one before it, and cannot be read meanwhile: a
// volume of UBI. Nothing that is in place is passed over then.
type SequentialWriter interface{ WritesInSequence() bool }

// sequential reports whether f has to be written from its beginning on.
func sequential(f Flash) bool {
	s, ok := f.(SequentialWriter)
	return ok && s.WritesInSequence()
}

// IOSizer is an optional interface of a [Flash] with a preferred size of reads and
// writes.
type IOSizer interface {
	IOSize() int64
}

// EraseUnit returns start and length of the erase unit of f that holds off. It
// returns n = 0 if f needs no erasing.
func EraseUnit(f Flash, off int64) (start, n int64) {
	if u, ok := f.(UnitEraser); ok {
		return u.EraseUnit(off)
	}
	e, ok := f.(Eraser)
	if !ok {
		return 0, 0
	}
	if n = e.EraseSize(); n <= 0 {
		return 0, 0
	}
	start = off - off%n
	return start, min(n, f.Size()-start)
}

// WriteSize returns the alignment and smallest length of a write to f, at
// least 1.
func WriteSize(f Flash) int64 {
	if w, ok := f.(WriteSizer); ok {
		return max(1, w.WriteSize())
	}
	return 1
}

// IOSize returns the size of reads and writes that f prefers, 0 if it has not said.
func IOSize(f Flash) int64 {
	if s, ok := f.(IOSizer); ok {
		return max(0, s.IOSize())
	}
	return 0
}

// Direct returns a reader that asks the medium of f, or nil; see [DirectReader].
func Direct(f Flash) io.ReaderAt {
	if d, ok := f.(DirectReader); ok {
		return d.DirectReader()
	}
	return nil
}

// Zero makes bytes of f zero, as [Zeroer] has it. The error wraps ErrUnsupported
// if f cannot.
func Zero(f Flash, off, n int64) error {
	if z, ok := f.(Zeroer); ok {
		return z.Zero(off, n)
	}
	return ErrUnsupported
}

// ErasedByte returns the value of an erased byte of f: 0xFF unless f says
// otherwise.
func ErasedByte(f Flash) byte {
	if e, ok := f.(ErasedByter); ok {
		return e.ErasedByte()
	}
	return 0xff
}

// Region returns the n bytes of f from off on as a [Flash] of its own. On media
// with erase units the region must begin and end on unit boundaries.
// Operations on different regions of one Flash are as concurrent as f allows.
func Region(f Flash, off, n int64) (Flash, error) {
	if off < 0 || n < 0 || off > f.Size() || n > f.Size()-off {
		return nil, fmt.Errorf("ota: region of %d bytes at %d: outside of a flash of %d bytes: %w", n, off, f.Size(), ErrInvalid)
	}
	r := region{f: f, off: off, n: n}
	e, ok := f.(Eraser)
	if !ok {
		return &r, nil
	}
	if n > 0 {
		if start, _ := EraseUnit(f, off); start != off {
			return nil, fmt.Errorf("ota: region at %d: inside the erase unit at %d: %w", off, start, ErrInvalid)
		}
		if start, size := EraseUnit(f, off+n-1); start+size != off+n {
			return nil, fmt.Errorf("ota: region ends at %d: inside the erase unit at %d: %w", off+n, start, ErrInvalid)
		}
	}
	return &eraseRegion{region: r, e: e}, nil
}

type region struct {
	f      Flash
	off, n int64
}

func (r *region) Size() int64      { return r.n }
func (r *region) Sync() error      { return r.f.Sync() }
func (r *region) WriteSize() int64 { return WriteSize(r.f) }
func (r *region) IOSize() int64    { return IOSize(r.f) }

// WritesInSequence implements [SequentialWriter].
func (r *region) WritesInSequence() bool { return sequential(r.f) }

func (r *region) ReadAt(p []byte, off int64) (int, error) { return r.read(r.f, p, off) }

// DirectReader implements [DirectReader].
func (r *region) DirectReader() io.ReaderAt {
	d := Direct(r.f)
	if d == nil {
		return nil
	}
	return readerAt(func(p []byte, off int64) (int, error) { return r.read(d, p, off) })
}

type readerAt func(p []byte, off int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// Zero implements [Zeroer].
func (r *region) Zero(off, n int64) error {
	if off < 0 || n < 0 || off > r.n || n > r.n-off {
		return fmt.Errorf("ota: zeroing %d bytes at %d: outside of a region of %d bytes: %w", n, off, r.n, ErrTooLarge)
	}
	return Zero(r.f, r.off+off, n)
}

// read reads through from, which has the offsets of r.f.
func (r *region) read(from io.ReaderAt, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("ota: read at %d: %w", off, ErrInvalid)
	}
	if off >= r.n {
		return 0, io.EOF
	}
	if rest := r.n - off; int64(len(p)) > rest {
		n, err := from.ReadAt(p[:rest], r.off+off)
		if err == nil {
			err = io.EOF
		}
		return n, err
	}
	return from.ReadAt(p, r.off+off)
}

func (r *region) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > r.n || int64(len(p)) > r.n-off {
		return 0, fmt.Errorf("ota: write of %d bytes at %d: outside of a region of %d bytes: %w", len(p), off, r.n, ErrTooLarge)
	}
	return r.f.WriteAt(p, r.off+off)
}

type eraseRegion struct {
	region
	e Eraser
}

func (r *eraseRegion) EraseSize() int64 { return r.e.EraseSize() }
func (r *eraseRegion) ErasedByte() byte { return ErasedByte(r.f) }

func (r *eraseRegion) EraseUnit(off int64) (start, n int64) {
	start, n = EraseUnit(r.f, r.off+off)
	return start - r.off, n
}

func (r *eraseRegion) Erase(off, n int64) error {
	if off < 0 || n < 0 || off > r.n || n > r.n-off {
		return fmt.Errorf("ota: erase of %d bytes at %d: outside of a region of %d bytes: %w", n, off, r.n, ErrTooLarge)
	}
	return r.e.Erase(r.off+off, n)
}

// readFull reads len(p) bytes at off. A short read without an error is one.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// writeFull writes p at off. A short write without an error is one.
func writeFull(f io.WriterAt, p []byte, off int64) error {
	n, err := f.WriteAt(p, off)
	if err == nil && n != len(p) {
		err = io.ErrShortWrite
	}
	return err
}
