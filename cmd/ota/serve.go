package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
)

func serve(fs *flag.FlagSet) func(context.Context, *env, []string) error {
	listen := fs.String("listen", "127.0.0.1:8000", "`address` to serve at")
	cert := fs.String("tls-cert", "", "`file` with the certificate, PEM; serves HTTPS")
	key := fs.String("tls-key", "", "`file` with its key, PEM")
	return func(ctx context.Context, e *env, args []string) error {
		if err := want(args, 1, 1); err != nil {
			return err
		}
		if (*cert == "") != (*key == "") {
			return usagef("-tls-cert and -tls-key go together")
		}
		root, err := os.OpenRoot(args[0])
		if err != nil {
			return err
		}
		defer root.Close()
		l, err := net.Listen("tcp", *listen)
		if err != nil {
			return err
		}
		web := &http.Server{Handler: &shelf{root: root.FS(), e: e, small: *cert != "", known: map[string]shelved{}},
			ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
		served := make(chan error, 1)
		go func() {
			if *cert == "" {
				served <- web.Serve(l)
			} else {
				served <- web.ServeTLS(l, *cert, *key)
			}
		}()
		scheme := "http"
		if *cert != "" {
			scheme = "https"
		}
		e.printf("%s://%s\n", scheme, l.Addr())
		select {
		case err = <-served:
			return err
		case <-ctx.Done():
			web.Close()
			<-served
			return nil
		}
	}
}

// shelf serves the files below root, and nothing else: no listings, no links that
// lead out.
type shelf struct {
	root  fs.FS
	e     *env
	small bool // send in small pieces: TLS records of full size are too much for small devices

	mu    sync.Mutex
	known map[string]shelved
}

// shelved is what is known of a file, as long as size and time stay the same.
type shelved struct {
	size int64
	time time.Time
	etag string
	fw   string // X-MGOS-FW-Version of a device that runs it; "" if it is no bundle
}

// maxKnown bounds the memory; a shelf rarely has more files.
const maxKnown = 1000

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status := &statusWriter{ResponseWriter: w, small: s.small}
	s.serve(status, r)
	device := r.Header.Get("X-MGOS-Device-ID")
	if device != "" {
		device = " for " + ota.Quote(device)
	}
	s.e.notef("%s %s %s: %d%s", plain(r.RemoteAddr), r.Method, ota.Quote(r.URL.Path), status.code, device)
}

func (s *shelf) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "use GET", http.StatusMethodNotAllowed)
		return
	}
	name := strings.TrimPrefix(path.Clean("/"+r.URL.Path), "/")
	f, err := s.root.Open(name)
	if err != nil {
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	content, ok := f.(io.ReadSeeker)
	if err != nil || !ok || !info.Mode().IsRegular() {
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	k, err := s.look(r.Context(), name, info, content)
	if err != nil {
		http.Error(w, "cannot be read", http.StatusInternalServerError)
		return
	}
	w.Header().Set("ETag", k.etag)
	// The original compares the version only (mongoose-os/ota-server,
	// handler/handler.go), which is the same for nearly all builds.
	if has := r.Header.Get("X-MGOS-FW-Version"); has != "" && has == k.fw {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	if strings.HasSuffix(name, ".zip") {
		w.Header().Set("Content-Type", "application/zip")
	} else {
		w.Header().Set("Content-Type", "application/octet-stream")
	}
	http.ServeContent(w, r, name, info.ModTime(), content)
}

// look returns what is known of a file, after reading it if need be.
func (s *shelf) look(ctx context.Context, name string, info fs.FileInfo, content io.ReadSeeker) (shelved, error) {
	s.mu.Lock()
	k, ok := s.known[name]
	s.mu.Unlock()
	if ok && k.size == info.Size() && k.time.Equal(info.ModTime()) {
		return k, nil
	}
	k = shelved{size: info.Size(), time: info.ModTime()}
	sum := sha256.New()
	anybody := &bundle.Policy{AllowUnsigned: true, AllowSHA1: true, MaxWindow: bundle.MaxFrame, MaxIndex: maxIndex}
	if b, err := anybody.Open(ctx, io.TeeReader(content, sum)); err == nil {
		i := b.Info()
		k.fw = i.Platform + " " + i.Version + " " + i.BuildID
	}
	if _, err := io.Copy(sum, content); err != nil {
		return k, err
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return k, err
	}
	k.etag = `"` + hex.EncodeToString(sum.Sum(nil)[:16]) + `"`
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= maxKnown {
		clear(s.known)
	}
	s.known[name] = k
	return k, nil
}

// statusWriter remembers the status.
type statusWriter struct {
	http.ResponseWriter
	code  int
	small bool
}

func (w *statusWriter) WriteHeader(code int) {
	w.code = code
	w.ResponseWriter.WriteHeader(code)
}

// Unwrap lets [http.ResponseController] through.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *statusWriter) Write(p []byte) (n int, err error) {
	if w.code == 0 {
		w.code = http.StatusOK
	}
	if !w.small {
		return w.ResponseWriter.Write(p)
	}
	c := http.NewResponseController(w.ResponseWriter)
	for len(p) > 0 {
		k, err := w.ResponseWriter.Write(p[:min(1024, len(p))])
		n, p = n+k, p[k:]
		if err = errors.Join(err, c.Flush()); err != nil {
			return n, err
		}
	}
	return n, nil
}
