package bundle_test

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// testdata/hostile is made by the generators in this package's tests:
//
//	go test ./bundle -run Corpus -update
//
// Other implementations are welcome to it: each entry says what it is, which
// error this package gives for it ("" = accepted), and holds its bytes.
var update = flag.Bool("update", false, "write testdata/hostile anew")

// sample is an entry of the corpus.
type sample struct {
	Name  string `json:"name"`
	Class string `json:"class"`
	Error string `json:"error"` // name of a sentinel error; "" = accepted
	// Exactly one of these holds the input.
	Text     *string `json:"text,omitempty"`
	Base64   []byte  `json:"base64,omitempty"`
	Deflated []byte  `json:"deflated,omitempty"` // base64 of a raw deflate stream

	raw  []byte
	want []string // what Error may be
}

// sentinels are the errors by name, the more specific ones first.
var sentinels = []struct {
	name string
	err  error
}{
	{"ErrTruncated", bundle.ErrTruncated}, {"ErrNotZip", bundle.ErrNotZip}, {"ErrTrailing", bundle.ErrTrailing},
	{"ErrHeaderTooLong", bundle.ErrHeaderTooLong}, {"ErrMismatch", bundle.ErrMismatch}, {"ErrCompressed", bundle.ErrCompressed},
	{"ErrStreamed", bundle.ErrStreamed}, {"ErrZip64", bundle.ErrZip64}, {"ErrEncrypted", bundle.ErrEncrypted},
	{"ErrDuplicate", bundle.ErrDuplicate}, {"ErrName", bundle.ErrName}, {"ErrNoManifest", bundle.ErrNoManifest},
	{"ErrExtraEntry", bundle.ErrExtraEntry}, {"ErrMissing", bundle.ErrMissing},
	{"ErrUnsupported", bundle.ErrUnsupported}, {"ErrIndex", bundle.ErrIndex}, {"ErrCorrupt", bundle.ErrCorrupt},
	{"ErrNoDigest", bundle.ErrNoDigest}, {"ErrFormat", bundle.ErrFormat}, {"ErrManifest", bundle.ErrManifest}, {"ErrSize", bundle.ErrSize}, {"ErrCRC", bundle.ErrCRC},
	{"ErrTooLarge", bundle.ErrTooLarge}, {"ErrDigest", bundle.ErrDigest}, {"ErrUnsigned", bundle.ErrUnsigned},
	{"ErrSignature", bundle.ErrSignature},
}

// errorName returns the name of err, which must be one of the sentinels.
func errorName(t testing.TB, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	var e *bundle.Error
	require.ErrorAs(t, err, &e)
	require.Less(t, len(err.Error()), 400)
	require.False(t, strings.ContainsFunc(err.Error(), func(r rune) bool { return !strconv.IsPrint(r) }), "%q", err)
	for _, s := range sentinels {
		if errors.Is(err, s.err) {
			return s.name
		}
	}
	require.Fail(t, "not a sentinel error", "%v", err)
	return ""
}

// corpus compares the generated samples with those of the file, which it writes
// if told so, and requires that the file says what read does with each.
func corpus(t *testing.T, file string, made []sample, read func([]byte) error) []sample {
	t.Helper()
	path := filepath.Join("testdata", "hostile", file)
	if *update {
		for i := range made {
			s := &made[i]
			s.Error = errorName(t, read(s.raw))
			switch z := deflated(t, s.raw); {
			case printable(s.raw) && len(s.raw) < 1000:
				text := string(s.raw)
				s.Text = &text
			case len(z) < len(s.raw):
				s.Deflated = z
			default:
				s.Base64 = s.raw
			}
		}
		var b bytes.Buffer
		for i := range made {
			line, err := json.Marshal(made[i])
			require.NoError(t, err)
			b.WriteString(map[bool]string{true: "[\n", false: ",\n"}[i == 0])
			b.Write(line)
		}
		b.WriteString("\n]\n")
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, b.Bytes(), 0o644))
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Less(t, len(text), 1<<20)
	var stored []sample
	require.NoError(t, json.Unmarshal(text, &stored))
	require.Equal(t, len(made), len(stored), "run the test with -update")
	names := map[string]bool{}
	for i := range stored {
		s, m := &stored[i], &made[i]
		require.Equal(t, m.Name, s.Name, "run the test with -update")
		require.Equal(t, m.Class, s.Class, s.Name)
		switch {
		case s.Text != nil:
			s.raw = []byte(*s.Text)
		case s.Deflated != nil:
			s.raw, err = io.ReadAll(flate.NewReader(bytes.NewReader(s.Deflated)))
			require.NoError(t, err)
		default:
			s.raw = s.Base64
		}
		require.True(t, bytes.Equal(m.raw, s.raw), "%s: run the test with -update", s.Name)
		require.False(t, names[s.Name], "%s: two entries", s.Name)
		names[s.Name] = true
		require.NotEmpty(t, m.want, s.Name)
		require.Contains(t, m.want, s.Error, s.Name)

		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		err := read(s.raw)
		require.Less(t, time.Since(start), 10*time.Second, s.Name)
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(8<<20), "%s: bytes allocated", s.Name)
		require.Equal(t, s.Error, errorName(t, err), "%s: %v", s.Name, err)
	}
	return stored
}

func printable(b []byte) bool {
	return len(b) > 0 && !bytes.ContainsFunc(b, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r == '\ufffd' })
}

func deflated(t testing.TB, b []byte) []byte {
	var z bytes.Buffer
	w, err := flate.NewWriter(&z, flate.BestCompression)
	require.NoError(t, err)
	_, err = w.Write(b)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return z.Bytes()
}

func TestCorpusArchives(t *testing.T) {
	all := corpus(t, "archives.json", sortedByName(archives()), func(b []byte) error {
		_, err := old.Verify(context.Background(), bytes.NewReader(b))
		if _, _, err2 := content(context.Background(), old, bytes.NewReader(b)); (err == nil) != (err2 == nil) {
			return fmt.Errorf("Verify says %v, reading says %v", err, err2)
		}
		return err
	})
	count := map[string]int{}
	classes := map[string]bool{}
	for _, s := range all {
		classes[s.Class] = true
		kind := "refused"
		if s.Error == "" {
			kind = "accepted"
		} else if z, err := zip.NewReader(bytes.NewReader(s.raw), int64(len(s.raw))); err == nil && readable(z) {
			count["refused, but archive/zip reads it"]++
		}
		count[kind]++
		if strings.HasPrefix(s.Class, "name") && s.Error != "" {
			count["names"]++
		}
	}
	t.Logf("%d archives in %d classes: %v", len(all), len(classes), count)
	require.GreaterOrEqual(t, count["refused"], 800)
	require.GreaterOrEqual(t, count["accepted"], 80)
	require.GreaterOrEqual(t, count["names"], 200)

	unzip, err := exec.LookPath("unzip")
	if err != nil {
		require.NotEqual(t, "true", os.Getenv("CI"), "needs unzip: apt-get install unzip")
		t.Log("accepted archives were not held against Info-ZIP: needs unzip (apt-get install unzip)")
	}
	dir := t.TempDir()
	for _, s := range all {
		if s.Error != "" {
			continue
		}
		sameAsStandardLibrary(t, s.raw)
		if unzip != "" {
			sameAsInfoZIP(t, unzip, filepath.Join(dir, "x.zip"), s)
		}
	}
}

// sortedByName gives samples that come from maps an order.
func sortedByName(s []sample) []sample {
	slices.SortFunc(s, func(a, b sample) int { return strings.Compare(a.Name, b.Name) })
	return s
}

func readable(z *zip.Reader) bool {
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			return false
		}
		_, err = io.Copy(io.Discard, io.LimitReader(r, 4<<20))
		if r.Close() != nil || err != nil {
			return false
		}
	}
	return len(z.File) > 0
}

// sameAsInfoZIP requires that unzip lists and extracts what archive/zip does.
func sameAsInfoZIP(t *testing.T, unzip, path string, s sample) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, s.raw, 0o600))
	z, err := zip.NewReader(bytes.NewReader(s.raw), int64(len(s.raw)))
	require.NoError(t, err)
	var names, data bytes.Buffer
	for _, f := range z.File {
		names.WriteString(f.Name + "\n")
		r, err := f.Open()
		require.NoError(t, err)
		_, err = io.Copy(&data, r)
		require.NoError(t, err)
	}
	list, err := exec.Command(unzip, "-Z1", path).Output()
	require.NoError(t, err, s.Name)
	require.Equal(t, names.String(), string(list), s.Name)
	got, err := exec.Command(unzip, "-p", path).Output()
	require.NoError(t, err, s.Name)
	require.Equal(t, data.String(), string(got), s.Name)
}

// No name can become a path where there is no file system.
func TestNoFileSystem(t *testing.T) {
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	seen := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		seen++
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, i := range f.Imports {
			path, err := strconv.Unquote(i.Path.Value)
			require.NoError(t, err)
			require.NotContains(t, []string{"os", "io/fs", "path", "path/filepath", "syscall", "io/ioutil", "archive/zip"}, path, file)
		}
	}
	require.Greater(t, seen, 5)
}
