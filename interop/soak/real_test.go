package soak_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/slotota/ota/interop/statemachine"
	"github.com/slotota/ota/rpcjson"
)

var soakReal = flag.Duration("soak.real", 0, "length of the soak in real time, e.g. 2m; 0 skips it")

// transport serves a device and calls it, over a connection of its own kind.
type transport struct {
	name string
	// serve makes what handle returns reachable until stop is called, and
	// returns a function that connects to it.
	serve func(handle func() *rpcjson.Server) (connect func() (conn, error), stop func(), err error)
}

// conn is the client's end of a connection. call returns the result, or an error:
// an *rpcError if it came from the device.
type conn interface {
	call(ctx context.Context, method, params string) (json.RawMessage, error)
	Close() error
}

// transports returns all that are tested.
func transports() []transport {
	return []transport{{"http", serveHTTP}}
}

type rpcError struct {
	Code    int
	Message string
}

func (e *rpcError) Error() string { return fmt.Sprintf("%d %s", e.Code, e.Message) }

// result takes the reply to a frame apart.
func result(b []byte) (json.RawMessage, error) {
	var r struct {
		Result json.RawMessage
		Error  *rpcError
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("%w: %.100q", err, b)
	}
	if r.Error != nil {
		return nil, r.Error
	}
	return r.Result, nil
}

func serveHTTP(handle func() *rpcjson.Server) (func() (conn, error), func(), error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handle().ServeHTTP(w, r) })}
	done := make(chan struct{})
	go func() { defer close(done); hs.Serve(l) }()
	connect := func() (conn, error) {
		return &httpConn{&http.Client{Transport: &http.Transport{}}, "http://" + l.Addr().String() + "/rpc"}, nil
	}
	return connect, func() { hs.Close(); <-done }, nil
}

type httpConn struct {
	*http.Client
	url string
}

func (c *httpConn) call(ctx context.Context, method, params string) (json.RawMessage, error) {
	body := fmt.Appendf(nil, `{"id":1,"method":%q,"params":%s}`, method, params)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	return result(b)
}

func (c *httpConn) Close() error {
	c.CloseIdleConnections()
	return nil
}

// served is a device under a server, which changes with every boot.
type served struct {
	d     *sim.Device
	dev   *ota.Device
	srv   atomic.Pointer[rpcjson.Server]
	watch sync.WaitGroup
	stop  context.CancelFunc
}

// boot switches the device off and on.
func (s *served) boot() error {
	s.off()
	s.d.Chip.PowerOff(memflash.LoseAll, 0)
	booted := time.Now()
	dev, _, err := s.d.Boot(context.Background(), &ota.Options{
		Platform: "sim", Product: "demo",
		BootClock: func() (time.Duration, error) { return time.Since(booted), nil },
		Reset:     func(context.Context) error { return nil }, // the test takes the power away
	})
	if err != nil {
		return err
	}
	policy := &bundle.Policy{AllowUnsigned: true}
	srv, err := rpcjson.New(dev, rpcjson.Options{ID: "sim", NoAuth: true, Open: policy.Image})
	if err != nil {
		return err
	}
	s.dev = dev
	s.srv.Store(srv)
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	s.watch.Go(func() { dev.Watch(ctx) })
	return nil
}

// off ends all that runs on the device.
func (s *served) off() {
	if s.stop != nil {
		s.stop()
		s.srv.Load().Close()
		s.watch.Wait()
	}
}

// cycle is one update by push and what becomes of it: n counts them.
func (s *served) cycle(ctx context.Context, c conn, n int) error {
	i := statemachine.Image{Version: 2 + n%(sim.Versions-1)}
	if n%7 == 3 {
		i.Fault = statemachine.WrongDigest
	}
	zip, err := i.Bundle()
	if err != nil {
		return err
	}
	if _, err := c.call(ctx, "OTA.Begin", fmt.Sprintf(`{"commit_timeout":%d,"size":%d}`, n%2*3600, len(zip))); err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	failed := error(nil)
	for off := 0; off < len(zip) && failed == nil; off += 700 {
		params := fmt.Sprintf(`{"offset":%d,"data":%q}`, off, base64.StdEncoding.EncodeToString(zip[off:min(off+700, len(zip))]))
		if n%5 == 1 && off > 2000 {
			// The client goes away in the middle of a call, and comes back.
			gone, cancel := context.WithTimeout(ctx, time.Microsecond)
			c.call(gone, "OTA.Write", params)
			cancel()
		}
		if n%11 == 5 && off > 3000 {
			return s.boot() // the device loses its power
		}
		_, failed = c.call(ctx, "OTA.Write", params)
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { c.call(ctx, "OTA.Status", "{}") })
	}
	wg.Wait()
	_, err = c.call(ctx, "OTA.End", "{}")
	if bad := i.Fault != statemachine.Good; bad != (err != nil) || !bad && failed != nil {
		return fmt.Errorf("image %+v: %v, %v", i, failed, err)
	}
	if err := s.boot(); err != nil {
		return err
	}
	var re *rpcError
	method := "OTA.Commit"
	if n%6 == 2 {
		method = "OTA.Revert"
	}
	if _, err := c.call(ctx, method, "{}"); err != nil && !errors.As(err, &re) {
		return fmt.Errorf("%s: %w", method, err)
	}
	if err := s.boot(); err != nil {
		return err
	}
	b, err := c.call(ctx, "OTA.GetBootState", "{}")
	if err != nil {
		return err
	}
	var st ota.BootState
	if err := json.Unmarshal(b, &st); err != nil {
		return err
	}
	v := s.d.Identify(st.Active)
	if !st.Committed || v == 0 || method == "OTA.Commit" && i.Fault == statemachine.Good && v != i.Version {
		return fmt.Errorf("image %d in state %s after %s of %+v", v, b, method, i)
	}
	return nil
}

// descriptors returns the number of open files, -1 if that cannot be known.
func descriptors() int {
	f, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(f)
}

// sample is the heap in use at a time.
type sample struct{ at, heap float64 }

// slope is the growth of the heap in bytes per second, by least squares.
func slope(s []sample) float64 {
	var x, y, xx, xy float64
	for _, v := range s {
		x += v.at
		y += v.heap
		xx += v.at * v.at
		xy += v.at * v.heap
	}
	n := float64(len(s))
	if d := n*xx - x*x; d != 0 {
		return (n*xy - x*y) / d
	}
	return 0
}

// A device is updated over the network, over and over, by clients of all kinds. It
// needs no more memory, goroutines and open files at the end than at the start.
func TestRealSoak(t *testing.T) {
	if *soakReal == 0 {
		t.Skip("runs in real time, for as long as -soak.real says")
	}
	for _, tr := range transports() {
		t.Run(tr.name, func(t *testing.T) {
			d, err := sim.New(sim.Geometries()[0])
			require.NoError(t, err)
			goroutines, _ := settled(0)
			fds := descriptors()
			s := &served{d: d}
			require.NoError(t, s.boot())
			connect, stop, err := tr.serve(s.srv.Load)
			require.NoError(t, err)
			c, err := connect()
			require.NoError(t, err)

			length := *soakReal / time.Duration(len(transports()))
			start := time.Now()
			var heap []sample
			n := 0
			for time.Since(start) < length {
				require.NoErrorf(t, s.cycle(t.Context(), c, n), "cycle %d", n)
				n++
				if n%20 == 0 { // connections come and go, too
					require.NoError(t, c.Close())
					c, err = connect()
					require.NoError(t, err)
				}
				if at := time.Since(start); at > length/4 && float64(len(heap)) < 200*float64(at)/float64(length) {
					_, h := settled(0)
					heap = append(heap, sample{at.Seconds(), float64(h)})
				}
			}
			require.NoError(t, c.Close())
			stop()
			s.off()
			require.NoError(t, d.Chip.Err())
			require.Eventually(t, func() bool { return runtime.NumGoroutine() <= goroutines+1 }, 5*time.Second, 10*time.Millisecond, // one evaluates this
				"%d goroutines before", goroutines)
			require.Equal(t, fds, descriptors(), "open files")
			require.NotEmpty(t, heap, "too short")
			grown := heap[len(heap)-1].heap - heap[0].heap
			t.Logf("%s: %d updates in %v; heap %.0f KiB, grown by %.1f KiB, slope %.2f KiB/h (of %d samples); %d goroutines, %d open files before and after",
				tr.name, n, time.Since(start).Round(time.Second), heap[len(heap)-1].heap/1024, grown/1024, slope(heap)*3600/1024, len(heap), goroutines, fds)
			require.Less(t, grown, float64(256<<10), "bytes that the heap has grown by")
		})
	}
}
