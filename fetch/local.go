package fetch

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/slotota/ota"
)

// checkFile checks a file: URL (RFC 8089).
func checkFile(u *url.URL) error {
	switch {
	case u.Opaque != "" || !strings.HasPrefix(u.Path, "/"):
		return because(ErrURL, "need file:///path")
	case u.Host != "" && u.Host != "localhost":
		return because(ErrURL, "host %s: files are on this device", quote(u.Host))
	case u.User != nil || u.RawQuery != "":
		return because(ErrURL, "a file has neither user name nor query")
	}
	return nil
}

// fileName returns the name that a file: URL stands for.
func fileName(u *url.URL) string {
	name := filepath.FromSlash(u.Path)
	if cut := name[1:]; filepath.VolumeName(cut) != "" { // file:///C:/fw.zip
		return cut
	}
	return name
}

// local is a file on this device.
type local struct {
	file *File
	f    *os.File
	info fs.FileInfo
}

func openLocal(name string, limit int64) (*File, error) {
	l := &local{}
	err := l.open(name)
	if err == nil && l.info.Size() > limit {
		err = because(ErrTooLarge, "%d bytes, at most %d", l.info.Size(), limit)
		l.f.Close()
	}
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err // the name is below
		}
		return nil, &Error{URL: filepath.ToSlash(name), Err: err}
	}
	l.file = &File{name: filepath.ToSlash(name), size: l.info.Size(), ranged: true, src: l}
	return l.file, nil
}

var errNotRegular = errors.New("not a regular file")

func (l *local) open(name string) (err error) {
	// Opening a pipe would block, so look first.
	before, err := os.Stat(name)
	if err == nil && !before.Mode().IsRegular() {
		err = errNotRegular
	}
	if err != nil {
		return err
	}
	if l.f, err = os.Open(name); err != nil {
		return err
	}
	l.info, err = l.f.Stat()
	if err == nil && !l.info.Mode().IsRegular() {
		err = errNotRegular
	}
	if err != nil {
		l.f.Close()
	}
	return err
}

func (l *local) close() error { return l.f.Close() }

func (l *local) read(ctx context.Context, rs []ota.Range) (io.ReadCloser, error) {
	if rs == nil {
		rs = l.file.whole()
	}
	return &localReader{l: l, ctx: ctx, rs: rs}, nil
}

// unchanged compares what the file system says, at no cost.
func (l *local) unchanged() error {
	now, err := l.f.Stat()
	if err == nil && (now.Size() != l.info.Size() || !now.ModTime().Equal(l.info.ModTime())) {
		err = ErrChanged
	}
	return err
}

type localReader struct {
	l      *local
	ctx    context.Context
	rs     []ota.Range
	looked bool // the file was found unchanged
	closed atomic.Bool
}

func (r *localReader) Read(p []byte) (int, error) {
	n, err := r.read(p)
	if err != nil && err != io.EOF {
		err = r.l.file.wrap(err)
	}
	return n, err
}

func (r *localReader) read(p []byte) (int, error) {
	switch {
	case r.closed.Load():
		return 0, fs.ErrClosed
	case r.ctx.Err() != nil:
		return 0, context.Cause(r.ctx)
	case len(p) == 0:
		return 0, nil
	}
	if !r.looked || len(r.rs) == 0 {
		if err := r.l.unchanged(); err != nil {
			return 0, err
		}
		r.looked = true
	}
	if len(r.rs) == 0 {
		return 0, io.EOF
	}
	w := &r.rs[0]
	n, err := r.l.f.ReadAt(p[:min(int64(len(p)), w.Len)], w.Off)
	w.Off, w.Len = w.Off+int64(n), w.Len-int64(n)
	switch {
	case w.Len == 0:
		r.rs, err = r.rs[1:], nil
	case err == io.EOF:
		err = ErrChanged // shorter than it was
	}
	return n, err
}

// Close ends the reading; the file stays open.
func (r *localReader) Close() error {
	r.closed.Store(true)
	return nil
}
