package bundle_test

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// storedParts returns the files of r's parts as they are stored in file.
func storedParts(t *testing.T, r *bundle.Reader, file []byte) map[string]bundle.File {
	files := map[string]bundle.File{}
	for _, p := range r.Manifest().Parts {
		if p.Name == r.Manifest().Index {
			continue
		}
		s, err := r.Stored(bytes.NewReader(file), p.Name)
		require.NoError(t, err)
		files[p.Src] = s
	}
	return files
}

// A bundle made of what another one stores is the same.
func TestStored(t *testing.T) {
	file, _ := mixed(t, 512, 2048, 9000, nil)
	r, err := lax.Verify(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	var again bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &again, r.Manifest(), storedParts(t, r, file), nil))
	require.True(t, bytes.Equal(file, again.Bytes()))

	// Beside a part that is new, the others stay what they are.
	m := *r.Manifest()
	files := storedParts(t, r, file)
	files["plain.bin"] = strings.NewReader("new")
	again.Reset()
	require.NoError(t, bundle.Write(t.Context(), &again, &m, files, nil))
	b, err := lax.Open(t.Context(), bytes.NewReader(again.Bytes()))
	require.NoError(t, err)
	got, err := contentOf(t.Context(), b, 1000, nil)
	require.NoError(t, err)
	require.Equal(t, "new", got["plain"])
	for _, name := range []string{"deflated", "stored", "zstd"} {
		require.Equal(t, r.Manifest().Part(name), b.Manifest().Part(name))
		require.Equal(t, string(text(9000, map[string]uint64{"deflated": 1, "stored": 3, "zstd": 4}[name])), got[name])
	}
}

// What this package does not know stays with the part, and with the manifest.
func TestStoredExtra(t *testing.T) {
	content := text(3000, 1)
	manifest := `{"parts":{"a":{"src":"a.bin","size":3000,"cs_sha256":"` + sum256(string(content)) + `","x":{"y":[1]}},` +
		`"ota-index":{"src":"ota.index","size":112,"cs_sha1":"SHA1","cs_sha256":"SUM","update":false}},` +
		`"ota":{"format":1,"index":"ota-index","parts":{"a":{"chunk":1024,"section_sha256":"SECTION","x-b":"c"}},"x-d":2},"z":null}`
	index := "OTAINDEX\x01\x00\x00\x00\x01\x00\x00\x00"
	for off := 0; off < 3000; off += 1024 {
		sum := sha256.Sum256(content[off:min(off+1024, 3000)])
		index += string(sum[:])
	}
	manifest = strings.NewReplacer("SHA1", fmt.Sprintf("%x", sha1.Sum([]byte(index))), "SUM", sum256(index), "SECTION", sum256(index[16:])).Replace(manifest)
	require.Len(t, index, 112)
	file := (&archive{entries: []entry{{name: "manifest.json", data: manifest}, {name: "ota.index", data: index}, {name: "a.bin", data: string(content)}}}).bytes()
	r, err := lax.Verify(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	var again bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &again, r.Manifest(), storedParts(t, r, file), nil))
	b, err := lax.Verify(t.Context(), bytes.NewReader(again.Bytes()))
	require.NoError(t, err)
	require.JSONEq(t, string(r.Manifest().Raw()), string(b.Manifest().Raw()))
	require.Equal(t, map[string]json.RawMessage{"x-b": json.RawMessage(`"c"`)}, b.Manifest().Part("a").Storage.Extra)
}

func TestStoredRefused(t *testing.T) {
	file, _ := mixed(t, 512, 2048, 9000, nil)
	r, err := lax.Open(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	_, err = r.Stored(bytes.NewReader(file), "zstd")
	require.ErrorIs(t, err, ota.ErrInvalid, "not read")
	r, err = lax.Verify(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	for _, name := range []string{"ota-index", "nope", ""} {
		_, err = r.Stored(bytes.NewReader(file), name)
		require.ErrorIs(t, err, bundle.ErrMissing, name)
	}
	var bad *bundle.Error
	require.ErrorAs(t, err, &bad)

	files := storedParts(t, r, file)
	err = bundle.Write(t.Context(), io.Discard, r.Manifest(), files, &bundle.WriteOptions{Pack: map[string]bundle.Packing{"zstd": {Encoding: bundle.EncodingZstd}}})
	require.ErrorIs(t, err, bundle.ErrManifest)
	require.ErrorContains(t, err, "stored already")

	// A bundle that changed meanwhile is found out, wherever.
	for name, f := range files {
		s := f.(*bundle.Stored)
		at := bytes.Index(file, stored(t, s))
		require.Positive(t, at)
		other := bytes.Clone(file)
		other[at+int(s.Size())/2] ^= 1
		changed, err := r.Stored(bytes.NewReader(other), strings.TrimSuffix(name, ".bin"))
		require.NoError(t, err)
		all := storedParts(t, r, file)
		all[name] = changed
		require.ErrorIs(t, bundle.Write(t.Context(), io.Discard, r.Manifest(), all, nil), ota.ErrChanged, name)
		cut, err := r.Stored(bytes.NewReader(file[:at+1]), strings.TrimSuffix(name, ".bin"))
		require.NoError(t, err)
		all[name] = cut
		require.ErrorIs(t, bundle.Write(t.Context(), io.Discard, r.Manifest(), all, nil), ota.ErrChanged, name)
	}

	// Without a digest of what is stored there is nothing to rely on.
	old := (&archive{entries: []entry{{name: "manifest.json", data: `{"parts":{"a":{"src":"a","size":1,"cs_sha1":"86f7e437faa5a7fce15d1ddcb9eaeaea377667b8"}}}`}, {name: "a", data: "a"}}}).bytes()
	r, err = (&bundle.Policy{AllowUnsigned: true, AllowSHA1: true}).Verify(t.Context(), bytes.NewReader(old))
	require.NoError(t, err)
	_, err = r.Stored(bytes.NewReader(old), "a")
	require.ErrorIs(t, err, bundle.ErrNoDigest)
}

func stored(t *testing.T, f bundle.File) []byte {
	b := make([]byte, f.Size())
	_, err := io.ReadFull(io.NewSectionReader(f, 0, f.Size()), b)
	require.NoError(t, err)
	return b
}
