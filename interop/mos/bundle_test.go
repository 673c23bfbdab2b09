package mos_test

import (
	"archive/zip"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/mongoose-os/mos/common/fwbundle"
	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
)

// readAll reads a bundle with our reader: its parts to be installed.
func readAll(t *testing.T, p *bundle.Policy, b []byte) (*bundle.Reader, map[string][]byte) {
	t.Helper()
	r, err := p.Open(t.Context(), bytes.NewReader(b))
	require.NoError(t, err)
	parts := map[string][]byte{}
	for {
		q, err := r.Next(t.Context())
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		parts[q.Name], err = io.ReadAll(q.Data)
		require.NoError(t, err)
		require.NotNil(t, q.SHA256)
		require.Equal(t, *q.SHA256, sha256.Sum256(parts[q.Name]))
	}
	return r, parts
}

// genuine reads a bundle with the genuine reader.
func genuine(t *testing.T, b []byte) *fwbundle.FirmwareBundle {
	t.Helper()
	file := filepath.Join(t.TempDir(), "fw.zip")
	require.NoError(t, os.WriteFile(file, b, 0o600))
	f, err := fwbundle.ReadZipFirmwareBundle(file)
	require.NoError(t, err)
	return f
}

// Our reader reads what the genuine writer writes, in whichever order its map of
// parts comes out, and sees the same.
func TestReadGenuine(t *testing.T) {
	for range 20 {
		f := newBundle(t, "demo", "esp32", 5000)
		f.Description = `some "text" <&>`
		f.SetAttr("shelly_hk_model", "ShellyX")
		f.SetAttr("num", 5)
		var buf bytes.Buffer
		require.NoError(t, fwbundle.WriteZipFirmwareBytes(f, &buf, false, map[string]any{"note": "hello"}))
		r, parts := readAll(t, &bundle.Policy{AllowUnsigned: true}, buf.Bytes())

		require.Equal(t, json.RawMessage(`"hello"`), r.Attrs()["note"])
		info := r.Info()
		require.Equal(t, "demo", info.Name)
		require.Equal(t, "esp32", info.Platform)
		require.Equal(t, "2.0", info.Version)
		require.Equal(t, "20260202-000000/next", info.BuildID)
		require.True(t, info.Unsigned)
		require.Empty(t, info.SignedBy)
		require.Equal(t, []string{"app", "fs", "nvs"}, slices.Sorted(maps.Keys(parts)), "boot is not for updates")
		for name, got := range parts {
			want, err := f.GetPartData(name)
			require.NoError(t, err)
			require.Equal(t, want, got, name)
		}

		m := r.Manifest()
		require.Equal(t, f.Description, m.Description)
		require.Equal(t, json.RawMessage(`"ShellyX"`), m.Extra["shelly_hk_model"])
		require.Equal(t, json.RawMessage(`5`), m.Extra["num"])
		require.Equal(t, "fs.img", m.Part("fs").Src)
		require.Equal(t, json.RawMessage(`"LFS"`), m.Part("fs").Extra["fs_kind"])
		require.True(t, m.Part("boot").NoUpdate)
		require.Equal(t, json.RawMessage(`4096`), m.Part("boot").Extra["addr"])
		require.EqualValues(t, 255, *m.Part("nvs").Fill)

		// The text of the manifest is what we would write, too.
		text, err := m.MarshalJSON()
		require.NoError(t, err)
		var indented bytes.Buffer
		require.NoError(t, json.Indent(&indented, text, "", " "))
		require.Equal(t, string(m.Raw()), indented.String())
	}
}

func TestReadGenuineSigned(t *testing.T) {
	keys := newKeys(t, bundle.MaxKeys)
	var signers []crypto.Signer
	p := &bundle.Policy{}
	for _, k := range keys {
		signers = append(signers, k)
		p.Keys = append(p.Keys, &k.PublicKey)
	}
	r, _ := readAll(t, p, zipOf(t, "demo", "esp32", 5000, signers, false))
	require.Len(t, r.Info().SignedBy, bundle.MaxKeys)
	require.False(t, r.Info().Unsigned)

	signers[3] = nil
	b := zipOf(t, "demo", "esp32", 5000, signers, false)
	_, err := p.Open(t.Context(), bytes.NewReader(b))
	require.ErrorIs(t, err, bundle.ErrUnsigned)
	require.ErrorIs(t, err, ota.ErrUnverified)
	p.Required = 0xf7
	r, _ = readAll(t, p, b)
	require.Len(t, r.Info().SignedBy, bundle.MaxKeys-1)

	signers[4] = keys[5]
	_, err = p.Open(t.Context(), bytes.NewReader(zipOf(t, "demo", "esp32", 5000, signers, false)))
	require.ErrorIs(t, err, bundle.ErrSignature)
}

// What the genuine writer compresses we read, and the other way round. Devices of
// the original refuse it: at the first header, whose sizes differ.
func TestCompressed(t *testing.T) {
	b := zipOf(t, "demo", "esp32", 5000, nil, true)
	f := genuine(t, b)
	_, parts := readAll(t, &bundle.Policy{AllowUnsigned: true}, b)
	require.Equal(t, []string{"app", "fs", "nvs"}, slices.Sorted(maps.Keys(parts)))
	for name, got := range parts {
		want, err := f.GetPartData(name)
		require.NoError(t, err)
		require.Equal(t, want, got, name)
	}

	m := &bundle.Manifest{Name: "n", Platform: "esp32", Version: "1", BuildID: "b", Parts: []bundle.Part{{Name: "app", Src: "app.bin"}, {Name: "fs", Src: "fs.img"}}}
	app, fs := bytes.Repeat([]byte("application "), 5000), make([]byte, 100000)
	files := map[string]bundle.File{"app.bin": bytes.NewReader(app), "fs.img": bytes.NewReader(fs)}
	for _, chunk := range []int64{0, 4096} {
		for _, encoding := range []bundle.Encoding{bundle.EncodingNone, bundle.EncodingDeflate} {
			var out bytes.Buffer
			o := &bundle.WriteOptions{Pack: map[string]bundle.Packing{"app": {Encoding: encoding, Chunk: chunk}, "fs": {Chunk: chunk}}}
			require.NoError(t, bundle.Write(t.Context(), &out, m, files, o))
			f := genuine(t, out.Bytes())
			for name, want := range map[string][]byte{"app": app, "fs": fs} {
				got, err := f.GetPartData(name)
				require.NoError(t, err)
				require.Equal(t, want, got, name)
			}
			h := out.Bytes()[:30]
			compressed := encoding != bundle.EncodingNone
			require.Equal(t, compressed, h[8] != 0, "method of the first entry")
			require.Equal(t, compressed, !bytes.Equal(h[18:22], h[22:26]), "its sizes differ")
		}
	}
	// The genuine reader looks at no encoding of ours: the digest is that of what is installed.
	var out bytes.Buffer
	o := &bundle.WriteOptions{Pack: map[string]bundle.Packing{"app": {Encoding: bundle.EncodingZstd}}}
	require.NoError(t, bundle.Write(t.Context(), &out, m, files, o))
	require.NotZero(t, out.Bytes()[8])
	odd := genuine(t, out.Bytes())
	_, err := odd.GetPartData("app")
	require.ErrorContains(t, err, "checksum")
	got, err := odd.GetPartData("fs")
	require.NoError(t, err)
	require.Equal(t, fs, got)
}

// What the genuine reader and writer make of the recorded bundles is what we
// make of them.
func TestRebundle(t *testing.T) {
	for _, name := range []string{"small.zip", "nofs.zip", "signed.zip"} {
		t.Run(name, func(t *testing.T) {
			orig, err := os.ReadFile(recorded(t, name))
			require.NoError(t, err)
			f := genuine(t, orig)
			var buf bytes.Buffer
			require.NoError(t, fwbundle.WriteZipFirmwareBytes(f, &buf, false, nil))
			p := &bundle.Policy{AllowUnsigned: true}
			before, partsBefore := readAll(t, p, orig)
			after, partsAfter := readAll(t, p, buf.Bytes())
			require.Equal(t, partsBefore, partsAfter)
			require.Equal(t, string(before.Manifest().Raw()), string(after.Manifest().Raw()))
		})
	}
}

// What our parser sees in manifests of real firmware is what the genuine one
// sees.
func TestRealManifests(t *testing.T) {
	dir := filepath.Join("..", "..", "..", "shared", "mongoose", "bundles", "manifests")
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	require.NoError(t, err)
	if len(files) == 0 {
		t.Skipf("the collection of manifests is not at %s", dir)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		want, err := fwbundle.ReadManifest(file)
		require.NoError(t, err)
		got, err := bundle.ParseManifest(text)
		require.NoError(t, err)
		require.Equal(t, []string{want.Name, want.Platform, want.Version, want.BuildID},
			[]string{got.Name, got.Platform, got.Version, got.BuildID}, file)
		require.Len(t, got.Parts, len(want.Parts), file)
		for name, w := range want.Parts {
			g := got.Part(name)
			require.NotNil(t, g, "%s: %s", file, name)
			require.Equal(t, w.Type, g.Type)
			require.Equal(t, w.Src, g.Src)
			require.EqualValues(t, w.Size, g.Size)
			require.Equal(t, w.Fill, g.Fill)
			if w.ChecksumSHA1 != "" {
				require.Equal(t, w.ChecksumSHA1, hex.EncodeToString(g.SHA1[:]))
			}
			if w.ChecksumSHA256 != "" {
				require.Equal(t, w.ChecksumSHA256, hex.EncodeToString(g.SHA256[:]))
			}
		}
	}
}

// ours writes with our writer what newBundle makes, and returns the file and the
// content of its parts.
func ours(t *testing.T, o *bundle.WriteOptions) (b []byte, m *bundle.Manifest, files map[string][]byte) {
	t.Helper()
	files = map[string][]byte{
		"app.bin":  bytes.Repeat([]byte("app <&> "), 3000),
		"fs.img":   []byte("settings"),
		"boot.bin": bytes.Repeat([]byte{1}, 700),
	}
	fill := byte(255)
	m = &bundle.Manifest{
		Name: "demo", Platform: "esp32", Version: "2.0", BuildID: "20260202-000000/next",
		BuildTimestamp: "2026-02-02T00:00:00Z", Description: `some "text" <&>`,
		Parts: []bundle.Part{
			{Name: "app", Type: "app", Src: "app.bin", Extra: map[string]json.RawMessage{"ptn": []byte(`"app_0"`), "encrypt": []byte("true")}},
			{Name: "boot", Type: "boot", Src: "boot.bin", NoUpdate: true, Extra: map[string]json.RawMessage{"addr": []byte("4096")}},
			{Name: "fs", Type: "fs", Src: "fs.img", Extra: map[string]json.RawMessage{"fs_size": []byte("16384"), "fs_kind": []byte(`"LFS"`)}},
			{Name: "nvs", Type: "nvs", Size: 16384, Fill: &fill},
		},
		Security: 7,
		Extra:    map[string]json.RawMessage{"shelly_hk_model": []byte(`"ShellyX"`), "num": []byte("5")},
	}
	in := map[string]bundle.File{}
	for name, data := range files {
		in[name] = bytes.NewReader(data)
	}
	var buf bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &buf, m, in, o))
	return buf.Bytes(), m, files
}

// The genuine reader reads what our writer writes, and sees the same.
func TestGenuineReads(t *testing.T) {
	for _, o := range []*bundle.WriteOptions{
		nil,
		{Dir: "demo-2.0"},
		{Attrs: map[string]json.RawMessage{"note": []byte(`"hello"`)}},
		{Keys: []crypto.Signer{nil, newKeys(t, 1)[0]}},
	} {
		b, m, files := ours(t, o)
		f := genuine(t, b)
		require.Equal(t, m.Name, f.Name)
		require.Equal(t, m.Platform, f.Platform)
		require.Equal(t, m.Version, f.Version)
		require.Equal(t, m.BuildID, f.BuildID)
		require.Equal(t, m.Description, f.Description)
		require.Equal(t, m.BuildTimestamp, f.BuildTimestamp.UTC().Format("2006-01-02T15:04:05Z07:00"))
		require.Len(t, f.Parts, len(m.Parts))
		for _, p := range m.Parts {
			g := f.Parts[p.Name]
			require.NotNil(t, g, p.Name)
			require.Equal(t, p.Type, g.Type)
			require.Equal(t, p.Src, g.Src)
			data, err := f.GetPartData(p.Name) // checks both digests
			require.NoError(t, err)
			require.EqualValues(t, len(data), g.Size)
			if p.Src == "" {
				require.Equal(t, *p.Fill, *g.Fill)
				require.Equal(t, bytes.Repeat([]byte{*p.Fill}, int(p.Size)), data)
				continue
			}
			require.Equal(t, files[p.Src], data)
			require.Len(t, g.ChecksumSHA1, 40)
			require.Len(t, g.ChecksumSHA256, 64)
		}
		require.Equal(t, "app_0", f.Parts["app"].ESP32PartitionName)
		require.True(t, f.Parts["app"].ESP32Encrypt)
		require.EqualValues(t, 4096, f.Parts["boot"].Addr)
		require.EqualValues(t, 16384, f.Parts["fs"].FSSize)

		// It writes the manifest as we did, so nothing in it got lost.
		again, err := json.MarshalIndent(&f.FirmwareManifest, "", " ")
		require.NoError(t, err)
		r, _ := readAll(t, &bundle.Policy{AllowUnsigned: true}, b)
		require.Equal(t, string(r.Manifest().Raw()), string(again))
		require.EqualValues(t, 7, r.Info().Security)
	}
}

// Our signatures are what a genuine device verifies: ECDSA over the digest of the
// manifest's bytes, in the extra field of its entry.
func TestSignaturesAsGenuine(t *testing.T) {
	keys := newKeys(t, 2)
	b, _, _ := ours(t, &bundle.WriteOptions{Keys: []crypto.Signer{keys[0], nil, keys[1]}})
	z, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Equal(t, "manifest.json", z.File[0].Name)
	f, err := z.File[0].Open()
	require.NoError(t, err)
	manifest, err := io.ReadAll(f)
	require.NoError(t, err)
	extra := z.File[0].Extra
	require.Equal(t, []byte{0x3a, 0x29, byte(len(extra) - 4), byte((len(extra) - 4) >> 8)}, extra[:4])
	var sigs map[string][]byte // base64
	require.NoError(t, json.Unmarshal(extra[4:], &sigs))
	require.Len(t, sigs, 2)
	digest := sha256.Sum256(manifest)
	require.True(t, ecdsa.VerifyASN1(&keys[0].PublicKey, digest[:], sigs["sig0"]))
	require.True(t, ecdsa.VerifyASN1(&keys[1].PublicKey, digest[:], sigs["sig2"]))
}

// A public key in the form of the setting update.key0 is one that ParseKey takes.
func TestDeviceKeyFormat(t *testing.T) {
	text, err := os.ReadFile(recorded(t, "k0.pub.pem"))
	require.NoError(t, err)
	block, _ := pem.Decode(text)
	require.NotNil(t, block)
	want, err := x509.ParsePKIXPublicKey(block.Bytes)
	require.NoError(t, err)
	got, err := bundle.ParseKey([]byte(base64.StdEncoding.EncodeToString(block.Bytes)))
	require.NoError(t, err)
	require.True(t, got.Equal(want))
}
