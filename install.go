package ota

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"reflect"
	"sync"
	"sync/atomic"
)

const (
	// defaultBlock is the size of a block.
	defaultBlock = 256 << 10
	// spareBlocks is how many blocks there are beside those that one chunk takes:
	// one with each of reader, checker and writer, one between each two of them,
	// and one that a chunk shares with its neighbour.
	spareBlocks = 5
	// pageSize is what direct I/O wants memory, offsets and lengths aligned to.
	pageSize = 4096
	// grainSize is the unit of media without erase units, if chunks are no smaller.
	grainSize = 64 << 10
	// maxBackoff bounds how many blocks go by uncompared.
	maxBackoff = 64
)

// installer writes, verifies and hashes parts of slots. It belongs to one
// operation and is not safe for concurrent use.
type installer struct {
	size   int64 // of a block, 0 for the default
	blocks []*block
	bufs   [2][]byte // for reading back, beside blocks
	old    []byte    // for comparing
	failed bool      // the flash has, in a write, an erase or a sync
	counts *counters
	// progress is told how far the current phase of the current part is.
	progress func(phase Phase, done, total int64)
}

// counters are what [Counts] is made of.
type counters struct {
	last                           Counts // to begin with
	fetched                        func() int64
	read, copied, skipped, written atomic.Int64
}

func (c *counters) sum() Counts {
	s := c.last
	if c.fetched != nil {
		s.Downloaded = c.fetched()
	}
	s.Read += c.read.Load()
	s.Copied += c.copied.Load()
	s.Skipped += c.skipped.Load()
	s.Written += c.written.Load()
	return s
}

func newInstaller(size int, counts *counters, progress func(Phase, int64, int64)) *installer {
	if progress == nil {
		progress = func(Phase, int64, int64) {}
	}
	if counts == nil {
		counts = &counters{}
	}
	return &installer{size: int64(size), counts: counts, progress: progress}
}

// blockSize returns the size of a block for f.
func (in *installer) blockSize(f Flash) int64 {
	if in.size > 0 {
		return in.size
	}
	if n := IOSize(f); n > 0 {
		return min(max(n, pageSize), 2*defaultBlock)
	}
	return defaultBlock
}

// aligned returns n bytes that begin on a page.
func aligned(n int64) []byte {
	if n < pageSize {
		return make([]byte, n)
	}
	b := make([]byte, n+pageSize-1)
	skip := -int64(reflect.ValueOf(b).Pointer()) & (pageSize - 1)
	return b[skip : skip+n : skip+n]
}

// grow makes *b at least n bytes long.
func grow(b *[]byte, n int64) {
	if int64(len(*b)) < n {
		*b = aligned(n)
	}
}

// pool returns n blocks of size bytes.
func (in *installer) pool(n int, size int64) []*block {
	for len(in.blocks) < n {
		in.blocks = append(in.blocks, &block{})
	}
	for _, b := range in.blocks[:n] {
		grow(&b.buf, size)
	}
	return in.blocks[:n]
}

// fits reports whether n bytes can be installed into f.
func fits(f Flash, n int64) error {
	w := WriteSize(f)
	if n < 0 || n > f.Size() || (n+w-1)/w*w > f.Size() {
		return fmt.Errorf("%d bytes into %d: %w", n, f.Size(), ErrTooLarge)
	}
	return nil
}

// job is a part to be installed.
type job struct {
	f    Flash
	want *PartInfo
	data io.Reader
	// suspect says that f may hold what a power cut has left behind.
	suspect bool
	// others hold firmware that chunks may be copied from.
	others []source
	// stop ends a read of data that blocks.
	stop func()
}

// written is what install did.
type written struct {
	PartState
	// direct is the digest of what the medium holds, if it was read back already.
	direct *[32]byte
}

// install makes j.f hold exactly the bytes of a part, syncs, and returns their
// digest. Unless it was read back already, nothing is verified yet.
func (in *installer) install(ctx context.Context, j *job) (written, error) {
	if err := in.clean(ctx, j); err != nil {
		return written{}, err
	}
	p := &pipe{
		in: in, ctx: ctx, job: j,
		layout: newLayout(j.f, j.want.Size, in.blockSize(j.f), j.want.Chunks),
		sum:    sha256.New(), from: Direct(j.f),
	}
	p.rewrite = j.suspect && p.e != nil || sequential(j.f)
	if err := p.plan(); err != nil {
		return written{}, err
	}
	return p.run()
}

// clean erases the units behind the part that are not blank. The others are erased
// when it is known that they differ.
func (in *installer) clean(ctx context.Context, j *job) error {
	f, size := j.f, j.want.Size
	e, ok := f.(Eraser)
	if !ok {
		return nil
	}
	for off := int64(0); off < f.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, n := EraseUnit(f, off)
		if start != off || n <= 0 {
			return &Error{Op: "erase", Slot: NoSlot, Off: off, Err: fmt.Errorf("erase unit of %d bytes at %d: %w", n, start, ErrInvalid)}
		}
		if off >= size {
			// Here only what is there counts, not how it got there.
			blank, err := in.blank(f, off, n)
			if err != nil {
				return err
			}
			if !blank || j.suspect {
				if err := e.Erase(off, n); err != nil {
					in.failed = true
					return &Error{Op: "erase", Slot: NoSlot, Off: off, Err: err}
				}
			}
			in.progress(PhaseErasing, off+n, f.Size())
		}
		off += n
	}
	return nil
}

// all reports whether every byte of b is v.
func all(b []byte, v byte) bool {
	return len(b) == 0 || b[0] == v && bytes.Equal(b[1:], b[:len(b)-1])
}

// blank reports whether the n bytes of f at off read as erased.
func (in *installer) blank(f Flash, off, n int64) (bool, error) {
	fill := ErasedByte(f)
	grow(&in.bufs[0], in.blockSize(f))
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

// reading returns two buffers of n bytes at least, which belong to whoever reads
// flash for the operation.
func (in *installer) reading(n int64) *[2][]byte {
	for i := range in.bufs {
		grow(&in.bufs[i], n)
	}
	return &in.bufs
}

// scan reads the first size bytes of r into bufs, one ahead, and hands them to fn in
// order. fn is told how many of them are new: it may return how many of the last ones
// it wants to see once more before those that follow, keep at most.
func (in *installer) scan(ctx context.Context, r io.ReaderAt, size, keep int64, bufs *[2][]byte, fn func(b []byte, fresh int64) (rest int64)) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	type piece struct {
		buf []byte
		n   int64 // bytes at keep
	}
	free, full := make(chan []byte, 2), make(chan piece, 2)
	for _, b := range bufs {
		free <- b
	}
	var rerr error
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(full)
		for off := int64(0); off < size; {
			p := piece{buf: <-free}
			if rerr = ctx.Err(); rerr != nil {
				return
			}
			p.n = min(int64(len(p.buf))-keep, size-off)
			if err := readFull(r, p.buf[keep:keep+p.n], off); err != nil {
				rerr = &Error{Op: "read", Slot: NoSlot, Off: off, Err: err}
				return
			}
			full <- p
			off += p.n
		}
	})
	var last, rest []byte
	for p := range full {
		from := keep - int64(copy(p.buf[keep-int64(len(rest)):keep], rest))
		if last != nil {
			free <- last
		}
		b := p.buf[from : keep+p.n]
		rest = b[int64(len(b))-fn(b, p.n):]
		last = p.buf
	}
	reader.Wait()
	return rerr
}

// digest hashes the first size bytes of f.
func (in *installer) digest(ctx context.Context, f Flash, size int64) (sum [32]byte, err error) {
	if size < 0 || size > f.Size() {
		return sum, fmt.Errorf("%d bytes of %d: %w", size, f.Size(), ErrTooLarge)
	}
	var r io.ReaderAt = f
	if d := Direct(f); d != nil {
		r = d
	}
	h, done := sha256.New(), int64(0)
	err = in.scan(ctx, r, size, 0, in.reading(in.blockSize(f)), func(b []byte, n int64) int64 {
		h.Write(b)
		done += n
		in.progress(PhaseVerifying, done, size)
		return 0
	})
	h.Sum(sum[:0])
	return sum, err
}

// verify reads f back: it must hold what w says and, where the medium is erased
// before it is written, nothing behind that.
func (in *installer) verify(ctx context.Context, f Flash, w written) error {
	var sum [32]byte
	if w.direct != nil {
		sum = *w.direct
		in.progress(PhaseVerifying, w.Size, w.Size)
	} else {
		var err error
		if sum, err = in.digest(ctx, f, w.Size); err != nil {
			return err
		}
	}
	if sum != w.SHA256 {
		return ErrVerify
	}
	if _, ok := f.(Eraser); !ok {
		return nil
	}
	blank, err := in.blank(f, w.Size, f.Size()-w.Size)
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
