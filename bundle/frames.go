package bundle

import (
	"context"
	"crypto/sha256"
	"io"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/slotota/ota"
)

// inFlight bounds the buffers of all frames that are being decoded, in bytes,
// where that leaves room for more than one frame.
const inFlight = 8 << 20

// decoder is what a Reader keeps for zstd: made once, used for all parts.
type decoder struct {
	z     *zstd.Decoder
	slots []*slot
}

// slack is room behind what is decoded, with which the decoder may write more
// than one byte at a time.
const slack = 32

// slot is a frame on its way.
type slot struct {
	in, out []byte
	info    *frameInfo
	size    int // installed bytes
	err     error
	done    chan struct{} // holds one: it is decoded
}

// slot returns slot k with room for stored and installed bytes of a frame.
func (d *decoder) slot(k int, stored, installed int64) *slot {
	if k == len(d.slots) {
		d.slots = append(d.slots, &slot{done: make(chan struct{}, 1)})
	}
	s := d.slots[k]
	if int64(cap(s.in)) < stored {
		s.in = make([]byte, stored)
	}
	if int64(len(s.out)) < installed+slack {
		s.out = make([]byte, installed+slack)
	}
	return s
}

// decode fills the first s.size bytes of out from s.in.
func (d *decoder) decode(s *slot, out []byte, window int64) error {
	if sha256.Sum256(s.in) != s.info.sha256 {
		return because(ErrDigest, "SHA-256 of a frame")
	}
	if err := checkFrame(s.in, s.size, window); err != nil {
		return err
	}
	got, err := d.z.DecodeAll(s.in, out[:0:min(len(out), s.size+slack)])
	if err != nil {
		return because(ErrCorrupt, "%w", err)
	}
	if len(got) != s.size {
		return because(ErrCorrupt, "a frame of %d bytes instead of %d", len(got), s.size)
	}
	return nil
}

// checkFrame refuses everything but one zstd frame, whole and alone, that says
// it has size bytes and needs no dictionary and no larger window (RFC 8878,
// section 3.1.1).
func checkFrame(b []byte, size int, window int64) error {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return because(ErrCorrupt, "%w", err)
	}
	if h.SingleSegment {
		h.WindowSize = h.FrameContentSize
	}
	switch {
	case h.Skippable:
		return because(ErrCorrupt, "a skippable frame")
	case h.DictionaryID != 0:
		return because(ErrCorrupt, "a frame that needs dictionary %d", h.DictionaryID)
	case !h.HasFCS:
		return because(ErrCorrupt, "a frame that does not say its size")
	case h.FrameContentSize != uint64(size):
		return because(ErrCorrupt, "a frame of %d bytes instead of %d", h.FrameContentSize, size)
	case h.WindowSize > uint64(window):
		return because(ErrCorrupt, "a frame with a window of %d bytes, not %d", h.WindowSize, window)
	}
	rest := b[h.HeaderSize:]
	for last := false; !last; {
		if len(rest) < 3 {
			return because(ErrCorrupt, "a frame that is cut")
		}
		block := uint32(rest[0]) | uint32(rest[1])<<8 | uint32(rest[2])<<16
		last = block&1 != 0
		n := int(block >> 3)
		if block>>1&3 == 1 { // one byte, repeated
			n = 1
		}
		if n > len(rest)-3 {
			return because(ErrCorrupt, "a frame that is cut")
		}
		rest = rest[3+n:]
	}
	if h.HasCheckSum && len(rest) >= 4 {
		rest = rest[4:]
	} else if h.HasCheckSum {
		return because(ErrCorrupt, "a frame that is cut")
	}
	if len(rest) > 0 {
		return because(ErrCorrupt, "%d bytes after a frame", len(rest))
	}
	return nil
}

// frames yields the wanted bytes of a part that is stored as zstd frames. Those
// are read by the caller of Read, one after another, and decoded by it or by
// goroutines, which end when the last frame was read, when ctx is done, and by
// stop.
type frames struct {
	d     *data
	ctx   context.Context
	dec   *decoder
	frame int64
	most  int64 // stored bytes of a frame
	want  []ota.Range

	// The next frame to be read, where it is stored, and for which range.
	next, off int64
	needs     []ota.Range
	err       error // why no more can be read

	avail   []byte
	at      int64   // frame that avail is of, -1 at first
	cur     *slot   // which holds avail
	free    []*slot // to be filled
	pending []*slot // being decoded, in order

	jobs chan *slot // nil if there are no goroutines
	quit chan struct{}
	wg   sync.WaitGroup
}

// newFrames returns frames that yield want, or all if d is read in full.
func newFrames(d *data, workers int) (*frames, error) {
	st := d.q.Storage
	f := &frames{d: d, ctx: d.r.src.ctx, frame: st.Frame, want: d.wanted, off: d.start, at: -1}
	if !d.some {
		f.want = []ota.Range{{Len: d.q.Size}}
	}
	f.needs = append(f.needs, f.want...)
	for i := range d.sec.frames {
		f.most = max(f.most, int64(d.sec.frames[i].size))
	}
	var err error
	if f.dec, err = d.r.decoder(); err != nil {
		return nil, err
	}
	n := min(f.count(), int64(workers)+1, inFlight/(f.most+min(st.Frame, d.q.Size)))
	if workers < 2 || n < 2 {
		n = 1
	}
	for k := range int(n) {
		f.free = append(f.free, f.dec.slot(k, f.most, min(st.Frame, d.q.Size)))
	}
	if n > 1 {
		f.start(int(n - 1))
	}
	return f, nil
}

// count returns how many frames are needed.
func (f *frames) count() (n int64) {
	last := int64(-1)
	for _, w := range f.want {
		first := max(w.Off/f.frame, last+1)
		last = (w.Off + w.Len - 1) / f.frame
		n += last + 1 - first
	}
	return n
}

// expect announces the frames that are needed.
func (f *frames) expect() {
	var rs []ota.Range
	off, i := f.d.start, int64(0)
	for _, w := range f.want {
		for ; i <= (w.Off+w.Len-1)/f.frame; i++ {
			n := int64(f.d.sec.frames[i].size)
			switch k := len(rs) - 1; {
			case i < w.Off/f.frame:
			case k >= 0 && rs[k].Off+rs[k].Len == off:
				rs[k].Len += n
			default:
				rs = append(rs, ota.Range{Off: off, Len: n})
			}
			off += n
		}
	}
	f.d.expect(rs)
}

// start starts n goroutines.
func (f *frames) start(n int) {
	f.jobs, f.quit = make(chan *slot, n+1), make(chan struct{})
	jobs, quit, window := f.jobs, f.quit, f.d.q.Storage.Window
	for range n {
		f.wg.Go(func() {
			for {
				select {
				case s, ok := <-jobs:
					if !ok {
						return
					}
					s.err = f.dec.decode(s, s.out, window)
					s.done <- struct{}{}
				case <-quit:
					return
				case <-f.ctx.Done():
					return
				}
			}
		})
	}
}

// stop ends the goroutines and waits for them.
func (f *frames) stop() {
	if f.quit != nil {
		close(f.quit)
		f.quit = nil
	}
	f.wg.Wait()
	for _, s := range f.pending {
		select {
		case <-s.done:
		default:
		}
	}
	f.pending = nil
}

// load reads the next frame that is needed into s; io.EOF if there is none.
func (f *frames) load(s *slot) error {
	for len(f.needs) > 0 && (f.needs[0].Off+f.needs[0].Len-1)/f.frame < f.next {
		f.needs = f.needs[1:]
	}
	if len(f.needs) == 0 {
		return io.EOF
	}
	for ; f.next < f.needs[0].Off/f.frame; f.next++ {
		f.off += int64(f.d.sec.frames[f.next].size)
	}
	if f.d.some {
		f.d.r.seek(f.off)
	}
	s.info = &f.d.sec.frames[f.next]
	s.size = int(min(f.frame, f.d.q.Size-f.next*f.frame))
	s.in = s.in[:s.info.size]
	if _, err := io.ReadFull(&f.d.in, s.in); err != nil {
		return err
	}
	f.off += int64(s.info.size)
	f.next++
	return nil
}

// Read implements io.Reader.
func (f *frames) Read(p []byte) (int, error) {
	if len(f.avail) == 0 {
		if len(f.want) == 0 {
			return 0, io.EOF
		}
		w := &f.want[0]
		if i := w.Off / f.frame; i != f.at {
			f.at = i
			if done, err := f.advance(p, w); done > 0 || err != nil {
				return done, err
			}
		}
		from := w.Off % f.frame
		f.avail = f.cur.out[from:min(int64(f.cur.size), from+w.Len)]
		f.taken(int64(len(f.avail)))
	}
	n := copy(p, f.avail)
	f.avail = f.avail[n:]
	return n, nil
}

// taken moves the beginning of what is wanted.
func (f *frames) taken(n int64) {
	w := &f.want[0]
	if w.Off, w.Len = w.Off+n, w.Len-n; w.Len == 0 {
		f.want = f.want[1:]
	}
}

// advance makes cur the next frame. If all of it is wanted and fits into p it
// may go there at once; then advance returns its length.
func (f *frames) advance(p []byte, w *ota.Range) (int, error) {
	if f.jobs == nil { // alone
		if f.cur == nil {
			f.cur = f.free[0]
		}
		s := f.cur
		if err := f.load(s); err != nil {
			return 0, err
		}
		if len(p) >= s.size && w.Len >= int64(s.size) && w.Off%f.frame == 0 {
			if err := f.dec.decode(s, p, f.d.q.Storage.Window); err != nil {
				return 0, err
			}
			f.taken(int64(s.size))
			return s.size, nil
		}
		return 0, f.dec.decode(s, s.out, f.d.q.Storage.Window)
	}
	if f.cur != nil {
		f.free = append(f.free, f.cur)
		f.cur = nil
	}
	for f.err == nil && len(f.free) > 0 {
		s := f.free[len(f.free)-1]
		if f.err = f.load(s); f.err != nil {
			close(f.jobs)
			break
		}
		f.free = f.free[:len(f.free)-1]
		f.pending = append(f.pending, s)
		f.jobs <- s // has room for all
	}
	if len(f.pending) == 0 {
		return 0, f.err
	}
	s := f.pending[0]
	select {
	case <-s.done:
	case <-f.ctx.Done():
		return 0, f.ctx.Err()
	}
	f.cur, f.pending = s, f.pending[:copy(f.pending, f.pending[1:])]
	if len(f.pending) == 0 && f.err != nil {
		f.wg.Wait()
	}
	return 0, s.err
}

// workers returns how many frames are decoded at the same time.
func (p *Policy) workers() int {
	if p.Workers > 0 {
		return p.Workers
	}
	return min(runtime.GOMAXPROCS(0), 4)
}
