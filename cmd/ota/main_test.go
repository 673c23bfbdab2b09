package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/rpcjson"
)

// tool runs a command in this process.
func tool(t *testing.T, terminal bool, args ...string) (code int, stdout, stderr string) {
	var out, msg bytes.Buffer
	e := &env{stdin: strings.NewReader(""), stdout: &out, stderr: &msg, getenv: func(string) string { return "" }, terminal: terminal, colour: terminal}
	code = e.run(t.Context(), args)
	return code, out.String(), msg.String()
}

// Every command explains itself, in lines that fit a terminal.
func TestHelp(t *testing.T) {
	_, all, _ := tool(t, false, "help")
	_, man, _ := tool(t, false, "man")
	for _, c := range commands() {
		require.Contains(t, all, "\n  "+c.name+" ")
		code, out, msg := tool(t, false, append(strings.Fields(c.name), "-h")...)
		require.Zero(t, code)
		require.Empty(t, msg)
		require.Contains(t, out, "Usage: "+c.synopsis()+"\n")
		if c.args == "" {
			code, out, msg := tool(t, false, append(strings.Fields(c.name), "what")...)
			require.Equal(t, exitUsage, code, "%s %s", c.name, msg)
			require.Empty(t, out, c.name)
		}
		require.NotEmpty(t, c.examples, c.name)
		for _, x := range c.examples {
			require.Contains(t, out, x)
		}
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "  ") || strings.HasPrefix(line, "        ") { // no example
				require.LessOrEqual(t, len(line), 81, line)
			}
		}
		for _, f := range c.flags() {
			require.NotEmpty(t, f.Usage, "%s -%s", c.name, f.Name)
			require.Contains(t, man, "\n\\-"+strings.ReplaceAll(f.Name, "-", "\\-"))
		}
	}
}

func TestParse(t *testing.T) {
	fs := flag.NewFlagSet("x", flag.ContinueOnError)
	a, b := fs.Bool("a", false, ""), fs.String("b", "", "")
	rest, err := parse(fs, []string{"one", "-a", "two", "-b", "v", "--", "-a"})
	require.NoError(t, err)
	require.Equal(t, []string{"one", "two", "-a"}, rest)
	require.True(t, *a)
	require.Equal(t, "v", *b)
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "512": 512, "0x4000": 16384, "16K": 16384, "64m": 64 << 20, "2G": 2 << 30, "7G": 7 << 30, "9223372036854775807": math.MaxInt64} {
		n, err := parseSize(s)
		require.NoError(t, err, s)
		require.Equal(t, want, n, s)
	}
	for _, s := range []string{"", "K", "-1", "1.5M", "9223372036854775807K", "x", "0xK"} {
		_, err := parseSize(s)
		require.Error(t, err, s)
	}
}

func TestJSONValue(t *testing.T) {
	for s, want := range map[string]string{"true": "true", "false": "false", "12": "12", "0x10": "16", "-5": "-5", "v": `"v"`, `"12"`: `"12"`, `a"b`: `"a\"b"`, "": `""`, "1.5": `"1.5"`} {
		require.JSONEq(t, want, string(jsonValue(s)), s)
	}
}

func TestIndexed(t *testing.T) {
	got, err := indexed(list{"a", "2=c", "b", "x=y"}, func(i int) bool { return i == 1 })
	require.NoError(t, err)
	require.Equal(t, [bundle.MaxKeys]string{"a", "", "c", "b", "x=y"}, got)
	for _, l := range []list{{"8=a"}, {"1=a", "1=b"}, {"1", "2", "3", "4", "5", "6", "7", "8", "9"}} {
		_, err := indexed(l, nil)
		var f *failure
		require.ErrorAs(t, err, &f, "%v", l)
		require.Equal(t, exitUsage, f.code)
	}
}

// Exit codes for what devices of all generations answer.
func TestClassify(t *testing.T) {
	remote := func(code int, text string) error { return &rpcjson.Error{Code: code, Message: text} }
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("x"), exitFailed},
		{context.Canceled, exitFailed},
		{fmt.Errorf("x: %w", rpcjson.ErrNoReply), exitUnreachable},
		{fmt.Errorf("x: %w", ota.ErrBusy), exitBusy},
		{fmt.Errorf("x: %w", ota.ErrRebootPending), exitBusy},
		{&bundle.Error{Off: -1, Err: bundle.ErrCRC}, exitVerify},
		{&bundle.Error{Off: -1, Err: bundle.ErrPolicy}, exitUsage},
		{remote(401, ""), exitFailed},
		{remote(418, "shutting down in 50 ms"), exitBusy},
		{remote(-1, "Update is already in progress"), exitBusy},
		{remote(-1, "Failed to init updater"), exitBusy},
		{remote(-1, "Previous update has not been committed yet"), exitUncommitted},
		{remote(-1, "Cannot create snapshots in uncommitted state"), exitUncommitted},
		{remote(-1, "Update failed to start: the firmware is not committed yet"), exitUncommitted},
		{remote(-18, "-18 Signature verification failed"), exitVerify},
		{remote(-12, "-12 Invalid checksum"), exitVerify},
		{remote(-11, "-11 Invalid CRC"), exitVerify},
		{remote(-1, "Invalid HTTP response code: 404"), exitFailed},
	} {
		code, _ := classify(c.err)
		require.Equal(t, c.want, code, "%v", c.err)
	}
}

// On a terminal there are colours and a bar, elsewhere neither.
func TestTerminal(t *testing.T) {
	dir := t.TempDir()
	app, zip := filepath.Join(dir, "app.bin"), filepath.Join(dir, "fw.zip")
	require.NoError(t, os.WriteFile(app, make([]byte, 1000), 0o600))
	for _, terminal := range []bool{true, false} {
		code, _, msg := tool(t, terminal, "create", "-o", zip, "-platform", "p", "-version", "1", "-part", "app="+app)
		require.Zero(t, code)
		require.Equal(t, terminal, strings.Contains(msg, "\rcreate     ["+strings.Repeat("#", 40)+"] 100 %\n"), msg)
		code, out, _ := tool(t, terminal, "verify", "-allow-unsigned", zip)
		require.Zero(t, code)
		require.Equal(t, terminal, strings.Contains(out, "\x1b[32mok\x1b[0m"), out)
	}
}

// Outside strings cannot write to the terminal as they like.
func TestHostileNames(t *testing.T) {
	dir := t.TempDir()
	app, zip := filepath.Join(dir, "app.bin"), filepath.Join(dir, "fw.zip")
	require.NoError(t, os.WriteFile(app, []byte("x"), 0o600))
	code, _, _ := tool(t, false, "create", "-o", zip, "-name", "a\x1b[2Jb", "-platform", "p\nq", "-version", "1\x1b", "-part", "app="+app+",type=\x1bt")
	require.Zero(t, code)
	for _, args := range [][]string{{"inspect", zip}, {"verify", "-allow-unsigned", "-platform", "z", zip}, {"verify", "-allow-unsigned", "-name", "z", zip}} {
		_, out, msg := tool(t, false, args...)
		require.NotContains(t, out+msg, "\x1b", args)
	}
}

// Under TLS, devices get small records: full ones need 16 KiB of their memory.
func TestSmallPieces(t *testing.T) {
	var sizes []int
	rec := httptest.NewRecorder()
	s := &statusWriter{ResponseWriter: &sizeWriter{rec, &sizes}, small: true}
	n, err := s.Write(make([]byte, 2500))
	require.NoError(t, err)
	require.Equal(t, 2500, n)
	require.Equal(t, http.StatusOK, s.code)
	require.Equal(t, []int{1024, 1024, 452}, sizes)
	require.True(t, rec.Flushed)
}

type sizeWriter struct {
	*httptest.ResponseRecorder
	sizes *[]int
}

func (w *sizeWriter) Write(p []byte) (int, error) {
	*w.sizes = append(*w.sizes, len(p))
	return w.ResponseRecorder.Write(p)
}

// Credentials come from the URL, flags or the environment, but not from two of
// them, and do not stay in the URL.
func TestCredentials(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(file, []byte(" from file\n"), 0o600))
	vars := map[string]string{"OTA_PASSWORD": "pv", "OTA_TOKEN": "tv"}
	for _, c := range []struct {
		target string
		d      deviceFlags
		none   bool // no variables
		want   rpcjson.ClientOptions
		url    string // "" for an error
	}{
		{"http://h/x", deviceFlags{}, true, rpcjson.ClientOptions{}, "http://h/x"},
		{"http://h", deviceFlags{}, false, rpcjson.ClientOptions{Token: "tv"}, "http://h"},
		{"http://h", deviceFlags{tokenFile: file}, false, rpcjson.ClientOptions{Token: "from file"}, "http://h"},
		{"http://h", deviceFlags{user: "u"}, false, rpcjson.ClientOptions{User: "u", Password: "pv"}, "http://h"},
		{"http://u@h", deviceFlags{}, false, rpcjson.ClientOptions{User: "u", Password: "pv"}, "http://h"},
		{"http://u:p%40@h:1/rpc?x", deviceFlags{}, false, rpcjson.ClientOptions{User: "u", Password: "p@"}, "http://h:1/rpc?x"},
		{"unix://u:p@/tmp/s", deviceFlags{}, false, rpcjson.ClientOptions{User: "u", Password: "p"}, "unix:///tmp/s"},
		{"http://u:p@h", deviceFlags{passwordFile: file}, false, rpcjson.ClientOptions{User: "u", Password: "from file"}, "http://h"},
		{"http://u:p@h", deviceFlags{user: "v"}, false, rpcjson.ClientOptions{}, ""},
		{"http://u@h", deviceFlags{}, true, rpcjson.ClientOptions{}, ""},
		{"http://u:p@h", deviceFlags{tokenFile: file}, false, rpcjson.ClientOptions{}, ""},
		{"http://h", deviceFlags{passwordFile: file}, false, rpcjson.ClientOptions{}, ""},
		{"http://h", deviceFlags{tokenFile: file + "x"}, false, rpcjson.ClientOptions{}, ""},
	} {
		e := &env{getenv: func(k string) string {
			if c.none {
				return ""
			}
			return vars[k]
		}}
		var o rpcjson.ClientOptions
		url, err := c.d.credentials(e, c.target, &o)
		if c.url == "" {
			require.Error(t, err, c.target)
			require.NotContains(t, err.Error(), ":p@")
			continue
		}
		require.NoError(t, err, c.target)
		require.Equal(t, c.url, url)
		require.Equal(t, c.want, o, c.target)
	}
}

// fullDisk takes so many bytes.
type fullDisk struct{ room int }

func (d *fullDisk) Write(p []byte) (int, error) {
	n := min(len(p), d.room)
	if d.room -= n; n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

// Who asks for output and cannot be given it is told so.
func TestStdoutFull(t *testing.T) {
	in := keyring(t)
	run := func(room int, args ...string) (code int, msg string) {
		var text bytes.Buffer
		e := &env{stdin: strings.NewReader(""), stdout: &fullDisk{room}, stderr: &text, getenv: func(string) string { return "" }}
		code = e.run(t.Context(), args)
		return code, text.String()
	}
	for _, args := range [][]string{
		{"inspect", in("fw.zip")}, {"inspect", "-json", in("fw.zip")}, {"verify", "-key", in("k.pub.pem"), in("fw.zip")},
		{"extract", "-stdout", in("fw.zip")}, {"sign", "-text", in("fw.zip")},
		{"create", "-o", "-", "-platform", "p", "-version", "1", "-part", "app=" + in("app.bin"), "-sign", in("k.pem")},
		{"trust", "show", in("trust")}, {"trust", "verify", in("trust")}, {"trust", "sign", "-text", in("trust")},
		{"version"}, {"help"}, {"help", "sign"}, {"sign", "-h"}, {"-h"}, {"man"}, {"completion", "bash"},
	} {
		code, msg := run(1<<20, args...)
		require.Zero(t, code, "%v %s", args, msg)
		for _, room := range []int{0, 5} {
			code, msg := run(room, args...)
			require.Equal(t, exitFailed, code, "%v", args)
			require.Equal(t, 1, strings.Count(msg, syscall.ENOSPC.Error()), "%v %s", args, msg)
		}
	}
	// Another failure keeps its exit code.
	code, msg := run(0, "verify", "-key", in("k.pub.pem"), "-platform", "q", in("fw.zip"))
	require.Equal(t, exitWrongPlatform, code)
	require.Contains(t, msg, syscall.ENOSPC.Error())
}

// A download is whole, or an error.
func TestDownloadTooLarge(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/chunked" {
			w.(http.Flusher).Flush()
		}
		_, _ = io.WriteString(w, "12345678") // the client may have gone
	}))
	defer srv.Close()
	t.Setenv("TMPDIR", t.TempDir())
	t.Setenv("TMP", os.Getenv("TMPDIR"))
	e := &env{stderr: io.Discard}
	for _, path := range []string{"/", "/chunked"} {
		name, remove, err := download(t.Context(), e, srv.URL+path, 8)
		require.NoError(t, err)
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		require.Equal(t, "12345678", string(b))
		remove()
		_, _, err = download(t.Context(), e, srv.URL+path, 7)
		require.ErrorIs(t, err, ota.ErrTooLarge)
		require.ErrorContains(t, err, "at most 7 bytes")
		left, err := os.ReadDir(os.TempDir())
		require.NoError(t, err)
		require.Empty(t, left, "a temporary file is left")
	}
}
