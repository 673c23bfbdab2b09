package ota

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
)

// defaultBuffer is the size of one of the two buffers of an install.
const defaultBuffer = 256 << 10

// eraseStep bounds how much is erased between two looks at the context.
const eraseStep = 1 << 20

// installer writes, verifies and hashes parts of slots. It belongs to one
// operation and is not safe for concurrent use.
type installer struct {
	bufs [2][]byte
	// progress is told how far the current phase of the current part is.
	progress func(phase Phase, done, total int64)
}

func newInstaller(size int, progress func(Phase, int64, int64)) *installer {
	if size <= 0 {
		size = defaultBuffer
	}
	if progress == nil {
		progress = func(Phase, int64, int64) {}
	}
	return &installer{bufs: [2][]byte{make([]byte, size), make([]byte, size)}, progress: progress}
}

// fits reports whether n bytes can be installed into f.
func fits(f Flash, n int64) error {
	w := WriteSize(f)
	if n < 0 || n > f.Size() || (n+w-1)/w*w > f.Size() {
		return fmt.Errorf("%d bytes into %d: %w", n, f.Size(), ErrTooLarge)
	}
	return nil
}

// install erases f as far as needed, writes exactly size bytes of data to it,
// syncs, and returns their digest. Nothing is verified yet. The data is read
// on the calling goroutine while another one hashes and writes; it has ended
// when install returns. stop is called at the first error of that goroutine, to
// end a read that blocks.
func (in *installer) install(ctx context.Context, f Flash, data io.Reader, size int64, stop func()) (PartState, error) {
	if err := in.erase(ctx, f, size); err != nil {
		return PartState{}, err
	}
	// A buffer is a whole number of write units, so that only the last write
	// is padded.
	unit := WriteSize(f)
	step := max(int64(len(in.bufs[0]))/unit, 1) * unit
	for i := range in.bufs {
		if int64(len(in.bufs[i])) < step {
			in.bufs[i] = make([]byte, step)
		}
	}
	free := make(chan []byte, len(in.bufs))
	for _, b := range in.bufs {
		free <- b
	}
	full := make(chan []byte, len(in.bufs))
	w := partWriter{f: f, unit: unit, sum: sha256.New(), total: size, progress: in.progress}
	written := make(chan error, 1)
	go func() {
		var err error
		for b := range full {
			if err == nil {
				if err = w.write(b); err != nil {
					stop()
				}
			}
			free <- b[:cap(b)]
		}
		written <- err
	}()
	rerr := readChunks(ctx, data, size, step, free, full)
	close(full)
	if err := <-written; err != nil {
		return PartState{}, err
	}
	if rerr != nil {
		return PartState{}, rerr
	}
	if err := f.Sync(); err != nil {
		return PartState{}, err
	}
	st := PartState{Size: size}
	w.sum.Sum(st.SHA256[:0])
	return st, nil
}

// readChunks reads exactly size bytes of data, in steps, into buffers from
// free, and passes them on through full.
func readChunks(ctx context.Context, data io.Reader, size, step int64, free <-chan []byte, full chan<- []byte) error {
	for off := int64(0); off < size; {
		b := <-free
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(data, b[:min(step, size-off)])
		off += int64(n)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("%d of %d bytes: %w: %w", off, size, ErrTooSmall, io.ErrUnexpectedEOF)
			}
			return err
		}
		full <- b[:n]
	}
	// The read after the last byte reports what the format checks by itself.
	var one [1]byte
	switch n, err := io.ReadFull(data, one[:]); {
	case n != 0:
		return fmt.Errorf("more than the declared %d bytes: %w", size, ErrTooLarge)
	case err != io.EOF:
		return err
	}
	return ctx.Err()
}

// partWriter writes a part in order and hashes what it hands to the flash.
type partWriter struct {
	f          Flash
	unit       int64
	off, total int64
	sum        hash.Hash
	progress   func(Phase, int64, int64)
}

// write appends b, whose capacity has room for the padding of the last unit.
func (w *partWriter) write(b []byte) error {
	n := int64(len(b))
	w.sum.Write(b)
	_, erased := w.f.(Eraser)
	fill := byte(0)
	if erased {
		fill = ErasedByte(w.f)
	}
	for int64(len(b))%w.unit != 0 {
		b = append(b, fill)
	}
	// What is erased already costs nothing.
	if !erased || !all(b, fill) {
		if err := writeFull(w.f, b, w.off); err != nil {
			return &Error{Op: "write", Slot: NoSlot, Off: w.off, Err: err}
		}
	}
	w.off += n
	w.progress(PhaseWriting, w.off, w.total)
	return nil
}

// all reports whether every byte of b is v.
func all(b []byte, v byte) bool {
	return len(b) == 0 || b[0] == v && bytes.Equal(b[1:], b[:len(b)-1])
}

// erase prepares f for size bytes: the units that get data are erased, the
// others only if they are not blank. It does nothing on media that need none.
func (in *installer) erase(ctx context.Context, f Flash, size int64) error {
	e, ok := f.(Eraser)
	if !ok {
		return nil
	}
	total := f.Size()
	for off := int64(0); off < total; {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, n := EraseUnit(f, off)
		if start != off || n <= 0 {
			return &Error{Op: "erase", Slot: NoSlot, Off: off, Err: fmt.Errorf("erase unit of %d bytes at %d: %w", n, start, ErrInvalid)}
		}
		if off >= size {
			// Beyond the data only what is there counts, not how it got there.
			blank, err := in.blank(f, off, n)
			if err != nil {
				return err
			}
			if blank {
				off += n
				in.progress(PhaseErasing, off, total)
				continue
			}
		}
		// Neighbouring units that get data are erased in one call.
		for off+n < size && n < eraseStep {
			_, more := EraseUnit(f, off+n)
			if more <= 0 || n+more > eraseStep {
				break
			}
			n += more
		}
		if err := e.Erase(off, n); err != nil {
			return &Error{Op: "erase", Slot: NoSlot, Off: off, Err: err}
		}
		off += n
		in.progress(PhaseErasing, off, total)
	}
	return nil
}

// blank reports whether the n bytes of f at off read as erased.
func (in *installer) blank(f Flash, off, n int64) (bool, error) {
	fill := ErasedByte(f)
	for n > 0 {
		b := in.bufs[0][:min(n, int64(len(in.bufs[0])))]
		if err := readFull(f, b, off); err != nil {
			return false, &Error{Op: "read", Slot: NoSlot, Off: off, Err: err}
		}
		if !all(b, fill) {
			return false, nil
		}
		off += int64(len(b))
		n -= int64(len(b))
	}
	return true, nil
}

// digest hashes the first size bytes of f.
func (in *installer) digest(ctx context.Context, f Flash, size int64) (sum [32]byte, err error) {
	if size < 0 || size > f.Size() {
		return sum, fmt.Errorf("%d bytes of %d: %w", size, f.Size(), ErrTooLarge)
	}
	h := sha256.New()
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return sum, err
		}
		b := in.bufs[0][:min(size-off, int64(len(in.bufs[0])))]
		if err := readFull(f, b, off); err != nil {
			return sum, &Error{Op: "read", Slot: NoSlot, Off: off, Err: err}
		}
		h.Write(b)
		off += int64(len(b))
		in.progress(PhaseVerifying, off, size)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// verify reads f back: it must hold what st says and, where the medium is
// erased before it is written, nothing behind that.
func (in *installer) verify(ctx context.Context, f Flash, st PartState) error {
	sum, err := in.digest(ctx, f, st.Size)
	if err != nil {
		return err
	}
	if sum != st.SHA256 {
		return ErrVerify
	}
	if _, ok := f.(Eraser); !ok {
		return nil
	}
	blank, err := in.blank(f, st.Size, f.Size()-st.Size)
	if err == nil && !blank {
		err = fmt.Errorf("bytes behind the data: %w", ErrVerify)
	}
	return err
}

// verifySlot checks the parts of s against st, except those that the firmware
// writes to.
func (in *installer) verifySlot(ctx context.Context, s *Slot, st *SlotState) error {
	if len(st.Parts) != len(s.Parts) {
		return fmt.Errorf("%d parts known of %d: %w", len(st.Parts), len(s.Parts), ErrUnverifiedSlot)
	}
	for i, p := range s.Parts {
		if p.Mutable {
			continue
		}
		sum, err := in.digest(ctx, p.Flash, st.Parts[i].Size)
		if err == nil && sum != st.Parts[i].SHA256 {
			err = ErrDigest
		}
		if err != nil {
			return inPart(p.Name, err)
		}
	}
	return nil
}

// inPart adds the name of a part to err.
func inPart(name string, err error) error {
	e, ok := err.(*Error)
	if !ok {
		return &Error{Slot: NoSlot, Part: name, Off: -1, Err: err}
	}
	c := *e
	c.Part = name
	return &c
}
