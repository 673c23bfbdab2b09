package bundle_test

import (
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

const benchSize = 64 << 20

func benchFile(b *testing.B) []byte {
	data := make([]byte, benchSize)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	var w bytes.Buffer
	m := &bundle.Manifest{Parts: []bundle.Part{{Name: "app", Src: "app.bin"}}}
	require.NoError(b, bundle.Write(b.Context(), &w, m, map[string]bundle.File{"app.bin": bytes.NewReader(data)}, nil))
	return w.Bytes()
}

// What an update pays beside its own SHA-256.
func BenchmarkReader(b *testing.B) {
	file := benchFile(b)
	buf := make([]byte, 256<<10)
	b.SetBytes(benchSize)
	b.ReportAllocs()
	for b.Loop() {
		r, err := lax.Open(context.Background(), bytes.NewReader(file))
		require.NoError(b, err)
		p, err := r.Next(context.Background())
		require.NoError(b, err)
		for err == nil {
			_, err = p.Data.Read(buf)
		}
		require.Equal(b, io.EOF, err)
		_, err = r.Next(context.Background())
		require.Equal(b, io.EOF, err)
	}
}

func BenchmarkVerify(b *testing.B) {
	file := benchFile(b)
	b.SetBytes(benchSize)
	b.ReportAllocs()
	for b.Loop() {
		_, err := lax.Verify(context.Background(), bytes.NewReader(file))
		require.NoError(b, err)
	}
}

// The bound: the checksums and one copy, nothing else.
func BenchmarkChecksumsOnly(b *testing.B) {
	file := make([]byte, benchSize)
	buf := make([]byte, 256<<10)
	b.SetBytes(benchSize)
	for b.Loop() {
		h, crc := sha1.New(), uint32(0)
		for i := 0; i < len(file); i += len(buf) {
			copy(buf, file[i:])
			crc = crc32.Update(crc, crc32.IEEETable, buf)
			h.Write(buf)
		}
	}
}

func BenchmarkSHA256(b *testing.B) {
	file := make([]byte, benchSize)
	b.SetBytes(benchSize)
	for b.Loop() {
		sha256.Sum256(file)
	}
}
