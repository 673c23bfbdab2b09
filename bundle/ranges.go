package bundle

import (
	"context"
	"errors"
	"io"
	"slices"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// Source is a bundle of which any bytes can be read, such as a file or what a
// server has that takes range requests.
type Source interface {
	// Size returns the length of the bundle in bytes. It does not change.
	Size() int64
	// Ranges returns a reader of the bytes of rs, one range after another, and
	// then io.EOF. rs is not empty and must not be changed; its ranges ascend,
	// none is empty, and they neither overlap nor touch nor go past the end.
	// The reader gives up when ctx is done. It is closed when no more of it is
	// needed, which may be before its end.
	Ranges(ctx context.Context, rs []ota.Range) (io.ReadCloser, error)
}

// FileSource returns a Source that reads f.
func FileSource(f File) Source { return fileSource{f} }

type fileSource struct{ File }

func (f fileSource) Ranges(_ context.Context, rs []ota.Range) (io.ReadCloser, error) {
	return &fileRanges{f.File, slices.Clone(rs)}, nil
}

type fileRanges struct {
	f    io.ReaderAt
	rest []ota.Range
}

// Read implements io.Reader.
func (f *fileRanges) Read(p []byte) (int, error) {
	if len(f.rest) == 0 {
		return 0, io.EOF
	}
	r := &f.rest[0]
	n, err := f.f.ReadAt(p[:min(int64(len(p)), r.Len)], r.Off)
	if r.Off, r.Len = r.Off+int64(n), r.Len-int64(n); r.Len == 0 {
		f.rest = f.rest[1:]
	}
	if n > 0 {
		return n, nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return 0, err
}

// Close implements io.Closer.
func (f *fileRanges) Close() error { return nil }

// window is how much of a Source is read at first: the manifest as a rule, and
// all of a small bundle.
const window = 64 << 10

// cursor reads a Source at a place that can be changed.
type cursor struct {
	src  Source
	ctx  func() context.Context
	size int64
	off  int64 // of the next byte
	// plan is what is going to be read, asked for as one when the first byte of
	// it is. block is how much is asked for where there is no plan.
	plan  []ota.Range
	block func() int64
	open  io.ReadCloser // nil if there is none
	rest  []ota.Range   // what open still yields, if off is where it begins
}

// Read implements io.Reader.
func (c *cursor) Read(p []byte) (int, error) {
	if c.off >= c.size {
		return 0, io.EOF
	}
	if c.open == nil || c.rest[0].Off != c.off {
		c.close()
		rs := c.plan
		if len(rs) == 0 || rs[0].Off != c.off {
			rs = []ota.Range{{Off: c.off, Len: min(c.block(), c.size-c.off)}}
		}
		c.plan = nil
		open, err := c.src.Ranges(c.ctx(), rs)
		if err != nil {
			return 0, err
		}
		if open == nil {
			return 0, errors.New("the source returned no reader")
		}
		c.open, c.rest = open, slices.Clone(rs)
	}
	r := &c.rest[0]
	n, err := c.open.Read(p[:min(int64(len(p)), r.Len)])
	if n < 0 || int64(n) > min(int64(len(p)), r.Len) {
		return 0, errCount
	}
	c.off += int64(n)
	if r.Off, r.Len = r.Off+int64(n), r.Len-int64(n); r.Len == 0 {
		if c.rest = c.rest[1:]; len(c.rest) == 0 {
			if err == nil {
				err = c.atEnd()
			}
			c.close()
			if err == io.EOF {
				err = nil
			}
			return n, err
		}
	}
	if n > 0 && err == io.EOF {
		err = nil // the next call finds it
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// atEnd returns nil if open yields nothing more.
func (c *cursor) atEnd() error {
	for range 100 {
		n, err := c.open.Read(make([]byte, 1))
		if n != 0 {
			return errors.New("the source returned more than it was asked for")
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

func (c *cursor) close() {
	if c.open != nil {
		_ = c.open.Close()
		c.open, c.rest = nil, nil
	}
}

// expect sets the plan, but for what comes without it. Ranges that touch become
// one.
func (c *cursor) expect(rs []ota.Range) {
	from := c.off
	if c.open != nil && c.rest[0].Off == c.off {
		from += c.rest[0].Len
	}
	c.plan = nil
	for _, r := range rs {
		if cut := from - r.Off; cut > 0 {
			r.Off, r.Len = r.Off+cut, r.Len-cut
		}
		r.Len = min(r.Len, c.size-r.Off)
		if r.Len <= 0 {
			continue
		}
		if k := len(c.plan) - 1; k >= 0 && c.plan[k].Off+c.plan[k].Len == r.Off {
			c.plan[k].Len += r.Len
			continue
		}
		c.plan = append(c.plan, r)
	}
}

// seek makes off the offset of the next byte. It is for a Reader of a Source.
func (r *Reader) seek(off int64) {
	if skip := off - r.off; skip >= 0 && skip <= int64(r.br.Buffered()) {
		_, _ = r.br.Discard(int(skip)) // cannot fail
	} else {
		r.at.off = off
		r.br.Reset(r.src)
	}
	r.off = off
}

// ahead returns how much the next record takes at least, as far as is known.
func (r *Reader) ahead() int64 {
	switch {
	case r.m == nil:
		return window
	case r.missing == 0:
		return maxCentral * (MaxParts + 2) // the directory and the end record
	}
	n := 0
	for i := range r.m.Parts {
		if s := r.m.Parts[i].Src; !r.seen[strictjson.Fold(s)] {
			n = max(n, len(s))
		}
	}
	return int64(lenLocal + len(r.entries[0].dir) + n)
}

// expect says that the ranges of stored data of d are going to be read, and
// what follows d.
func (d *data) expect(rs []ota.Range) {
	if d.r.at == nil {
		return
	}
	next := ota.Range{Off: d.end, Len: d.r.ahead()}
	if d.e.descriptor {
		next.Len += lenDescriptor
	}
	d.r.at.expect(append(rs, next))
}

// selectable is the data of a part that need not be read in full.
type selectable struct{ *data }

var _ ota.Selector = selectable{}

// Select implements [ota.Selector].
func (s selectable) Select(wanted []ota.Range) error {
	d := s.data
	if d.body != nil || d.some {
		return because(ota.ErrInvalid, "selected after the first read")
	}
	end, left, chunk := int64(-1), int64(0), d.sec.chunks.Size
	for _, w := range wanted {
		switch {
		case w.Off <= end, w.Len <= 0, w.Len > d.q.Size-w.Off, w.Off%chunk != 0,
			w.Len%chunk != 0 && w.Off+w.Len != d.q.Size:
			return because(ota.ErrInvalid, "%d bytes at %d selected", w.Len, w.Off)
		}
		end = w.Off + w.Len
		left += w.Len
	}
	if left == d.q.Size {
		return nil // all of it, with all checks
	}
	d.some, d.left, d.wanted = true, left, slices.Clone(wanted)
	if left == 0 {
		d.err = io.EOF
	}
	return nil
}

// picked yields the wanted ranges of a part that is stored as it is.
type picked struct {
	d    *data
	want []ota.Range
}

func (p *picked) expect() {
	rs := slices.Clone(p.want)
	for i := range rs {
		rs[i].Off += p.d.start
	}
	p.d.expect(rs)
}

// Read implements io.Reader.
func (p *picked) Read(b []byte) (int, error) {
	if len(p.want) == 0 {
		return 0, io.EOF
	}
	w := &p.want[0]
	p.d.r.seek(p.d.start + w.Off)
	n, err := p.d.in.Read(b[:min(int64(len(b)), w.Len)])
	if w.Off, w.Len = w.Off+int64(n), w.Len-int64(n); w.Len == 0 {
		p.want = p.want[1:]
	}
	return n, err
}
