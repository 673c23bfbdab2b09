// Package cli_test runs the command line tool as scripts do, one script in
// testdata for each promise.
package cli_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"
)

// Every script has the tool in its PATH, OTA_DEVICE for the device that it
// simulates, and these commands beside those of testscript:
//
//	exits N COMMAND...     COMMAND ends with exit code N
//	missing WHAT           fail, where CI demands it
//	flip FILE OFF          flip a bit of the byte at OFF; from the end if negative
//	random FILE SIZE       make a file of arbitrary bytes, always the same
//	badline URL            serve a proxy to the device that breaks connections,
//	                       and leave its address in $BADLINE
//	seturl VARIABLE FILE   wait for another process to write its URL into FILE
//	get FILE PATH HEADER... -- STATUS
//	                       request PATH below the URL in FILE, require the status
func TestScripts(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the scripts use Unix sockets and signals")
	}
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(bin, "ota"), "github.com/slotota/ota/cmd/ota")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)

	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			// Not in the work directory, whose path may be too long for a socket.
			dir, err := os.MkdirTemp("", "ota")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			env.Setenv("PATH", bin+string(filepath.ListSeparator)+env.Getenv("PATH"))
			env.Setenv("SOCK", filepath.Join(dir, "s"))
			env.Setenv("OTA_DEVICE", "unix://"+filepath.Join(dir, "s"))
			env.Vars = slices.DeleteFunc(env.Vars, func(v string) bool { return strings.HasPrefix(v, "SOURCE_DATE_EPOCH=") })
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond != "ci" {
				return false, fmt.Errorf("no condition %s", cond)
			}
			return os.Getenv("CI") == "true", nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": exits, "missing": missing, "flip": flip, "random": random, "badline": badLine, "get": get, "seturl": setURL,
		},
	})
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if ee, ok := err.(*exec.ExitError); ok {
		got = ee.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func missing(ts *testscript.TestScript, _ bool, args []string) {
	ts.Fatalf("install the Debian package %s", strings.Join(args, " "))
}

func flip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFF")
	}
	off, err := strconv.Atoi(args[1])
	ts.Check(err)
	b, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	if off < 0 {
		off += len(b)
	}
	b[off] ^= 0x10
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

func random(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: random FILE SIZE")
	}
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	b := make([]byte, n)
	x := uint32(len(args[0])) + 2463534242 // xorshift32
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// badLine serves a proxy to the device: every third call is lost, and the answer to
// every fifth.
func badLine(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: badline URL")
	}
	socket := strings.TrimPrefix(args[0], "unix://")
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "localhost" },
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	var n atomic.Int64
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i := n.Add(1)
		if i > 4 && i%3 == 0 {
			panic(http.ErrAbortHandler)
		}
		if i > 4 && i%5 == 0 {
			w = httptest.NewRecorder()
			defer panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r)
	}))
	ts.Defer(web.Close)
	ts.Setenv("BADLINE", web.URL)
}

// urlIn waits for another process to write its URL into a file.
func urlIn(ts *testscript.TestScript, file string) string {
	poll, deadline := time.NewTicker(10*time.Millisecond), time.After(10*time.Second)
	defer poll.Stop()
	for {
		if b, err := os.ReadFile(ts.MkAbs(file)); err == nil && strings.HasSuffix(string(b), "\n") {
			return strings.TrimSpace(string(b))
		}
		select {
		case <-poll.C:
		case <-deadline:
			ts.Fatalf("no URL in %s", file)
		}
	}
}

// setURL leaves the URL in a file in a variable.
func setURL(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: seturl VARIABLE FILE")
	}
	ts.Setenv(args[0], urlIn(ts, args[1]))
}

// get requests the URL in the file args[0], plus a path.
func get(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 4 || args[len(args)-2] != "--" {
		ts.Fatalf("usage: get URLFILE PATH HEADER... -- STATUS")
	}
	base := urlIn(ts, args[0])
	u, err := url.Parse(base + args[1])
	ts.Check(err)
	req := &http.Request{Method: http.MethodGet, URL: u, Header: http.Header{}}
	for _, h := range args[2 : len(args)-2] {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	ts.Check(err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	ts.Check(err)
	head, err := json.MarshalIndent(res.Header, "", " ")
	ts.Check(err)
	fmt.Fprintf(ts.Stdout(), "%s\n%d bytes\n", head, len(body))
	if got := strconv.Itoa(res.StatusCode); got != args[len(args)-1] {
		ts.Fatalf("status %s, want %s", got, args[len(args)-1])
	}
}
