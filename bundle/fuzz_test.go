package bundle_test

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/json"
	"hash/crc32"
	"io"
	"strings"
	"testing"

	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// sameAsStandardLibrary requires that archive/zip, which goes by the
// directory, sees what this package sees, which goes by the entries.
func sameAsStandardLibrary(t *testing.T, file []byte) {
	t.Helper()
	b, err := old.Open(context.Background(), bytes.NewReader(file))
	require.NoError(t, err)
	z, err := zip.NewReader(bytes.NewReader(file), int64(len(file)))
	require.NoError(t, err)
	require.Empty(t, z.Comment)
	read := func(f *zip.File) string {
		r, err := f.Open()
		require.NoError(t, err)
		data, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Equal(t, uint64(len(data)), f.UncompressedSize64)
		return string(data)
	}
	byName := map[string]*zip.File{}
	for _, f := range z.File {
		base := f.Name[strings.IndexByte(f.Name, '/')+1:]
		require.NotContains(t, byName, base)
		byName[base] = f
	}
	require.Equal(t, string(b.Manifest().Raw()), read(z.File[0]))
	n := 1
	for {
		p, err := b.Next(context.Background())
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		data, err := io.ReadAll(p.Data)
		require.NoError(t, err)
		if src := b.Manifest().Part(p.Name).Src; src != "" {
			require.Equal(t, string(data), read(byName[src]))
		}
	}
	for _, p := range b.Manifest().Parts {
		if p.Src != "" {
			require.Equal(t, uint64(p.Size), byName[p.Src].UncompressedSize64)
			n++
		}
	}
	require.Len(t, z.File, n)
}

func FuzzReader(f *testing.F) {
	for _, name := range []string{"small.zip", "signed.zip", "nofs.zip", "compressed.zip"} {
		f.Add(load(f, name))
	}
	f.Add(good().bytes())
	f.Add(with(func(a *archive) {
		for i := range a.entries {
			a.entries[i].name = "d/" + a.entries[i].name
			a.entries[i].flags = 8
		}
	}).bytes())
	f.Fuzz(func(t *testing.T, file []byte) {
		for range 2 {
			b, err := old.Verify(context.Background(), bytes.NewReader(file))
			if err != nil {
				require.Less(t, len(err.Error()), 400)
			} else {
				require.NotEmpty(t, b.Manifest().Parts)
				sameAsStandardLibrary(t, file)
			}
			file = repair(file)
		}
	})
}

// repair returns file with right checksums, so that mutations get further.
func repair(file []byte) []byte {
	file = bytes.Clone(file)
	crcs := map[uint32]uint32{}
	i := 0
	for len(file)-i > 30 && le.Uint32(file[i:]) == 0x04034b50 {
		data := i + 30 + int(le.Uint16(file[i+26:])) + int(le.Uint16(file[i+28:]))
		size := int64(le.Uint32(file[i+22:]))
		if size > int64(len(file)-data) {
			break
		}
		end := data + int(size)
		crc := crc32.ChecksumIEEE(file[data:end])
		crcs[uint32(i)] = crc
		le.PutUint32(file[i+14:], crc)
		i = end
	}
	for len(file)-i > 46 && le.Uint32(file[i:]) == 0x02014b50 {
		if crc, ok := crcs[le.Uint32(file[i+42:])]; ok {
			le.PutUint32(file[i+16:], crc)
		}
		i += 46 + int(le.Uint16(file[i+28:])) + int(le.Uint16(file[i+30:]))
	}
	return file
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(plainManifest))
	f.Add([]byte(`{"parts":{"a":{"size":1,"fill":0,"x":[1,{"y":null}]}},"ota":{"security":1},"z":"\u00fc\ud83d\ude00"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := bundle.ParseManifest(text)
		if err != nil {
			require.Less(t, len(err.Error()), 400)
			return
		}
		// The lenient parser reads the same.
		var lenient struct {
			Name  string
			Parts map[string]struct {
				Src  string
				Size int64
				Fill *byte
			}
		}
		require.NoError(t, json.Unmarshal(text, &lenient))
		require.Equal(t, lenient.Name, m.Name)
		require.Len(t, lenient.Parts, len(m.Parts))
		for _, p := range m.Parts {
			l := lenient.Parts[p.Name]
			require.Equal(t, l.Src, p.Src)
			require.Equal(t, l.Size, p.Size)
			require.Equal(t, l.Fill, p.Fill)
		}
		// What is written is read, and written the same again.
		once, err := m.MarshalJSON()
		require.NoError(t, err)
		again, err := bundle.ParseManifest(once)
		require.NoError(t, err)
		twice, err := again.MarshalJSON()
		require.NoError(t, err)
		require.Equal(t, string(once), string(twice))
		require.Equal(t, len(m.Parts), len(again.Parts))
	})
}

// FuzzPacked reads compressed bundles in every way, and finds the same.
func FuzzPacked(f *testing.F) {
	file, _ := mixed(f, 512, 1024, 2000, nil)
	f.Add(file)
	file, _ = mixed(f, 512, 512, 10, nil)
	f.Add(file)
	f.Add(load(f, "compressed.zip"))
	f.Fuzz(func(t *testing.T, file []byte) {
		for range 2 {
			p := bundle.Policy{AllowUnsigned: true, AllowSHA1: true, MaxWindow: 1 << 20, MaxIndex: 1 << 16, MaxSize: 1 << 24, Workers: 1}
			_ = everyWay(t, p, file)
			file = repair(file)
		}
	})
}

// FuzzIndex reads bundles with the given index and frames, for which the manifest
// vouches.
func FuzzIndex(f *testing.F) {
	data := string(text(1500, 1))
	c := &crafted{frames: []string{frame(f, data[:1024]), frame(f, data[1024:])}, size: 1500, window: 1024, frame: 1024, chunk: 512, content: data}
	var index []byte
	c.change = func(b []byte) []byte { index = bytes.Clone(b); return b }
	c.bytes()
	f.Add(index, strings.Join(c.frames, ""), 0)
	f.Add(index, strings.Join(c.frames, ""), len(c.frames[0]))
	f.Fuzz(func(t *testing.T, index []byte, stored string, cut int) {
		c := *c
		c.change = func([]byte) []byte { return index }
		if cut > 0 && cut < len(stored) { // the index is about the frames
			c.frames, c.change = []string{stored[:cut], stored[cut:]}, nil
		} else {
			c.frames = []string{stored}
		}
		_ = everyWay(t, bundle.Policy{AllowUnsigned: true, Workers: 1}, c.bytes())
	})
}
