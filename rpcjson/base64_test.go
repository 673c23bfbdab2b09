package rpcjson

import (
	"encoding/base64"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// What the encoder writes is what encoding/base64 writes, whatever room there is.
func TestBase64(t *testing.T) {
	data := make([]byte, 8192)
	for i := range data { // all values of twelve bits, at both places
		switch i % 3 {
		case 0:
			data[i] = byte(i / 3 >> 4)
		case 1:
			data[i] = byte(i/3<<4) | byte(i/3>>8&15)
		default:
			data[i] = byte(i / 3)
		}
	}
	r := rand.NewChaCha8([32]byte{})
	e := newBase64Encoder()
	check := func(data []byte) {
		t.Helper()
		want := "x" + base64.StdEncoding.EncodeToString(data)
		for _, room := range []int{0, 1, len(want) - 1, len(want), len(want) + 9} {
			dst := append(make([]byte, 0, 1+room), 'x')
			require.Equal(t, want, string(e.append(dst, data)))
		}
	}
	check(data)
	_, _ = r.Read(data)
	for n := range 100 {
		check(data[n : 2*n])
	}
	check(data)
}

func BenchmarkBase64(b *testing.B) {
	data := make([]byte, 64<<10)
	r := rand.NewChaCha8([32]byte{})
	_, _ = r.Read(data)
	out := make([]byte, 0, base64.StdEncoding.EncodedLen(len(data)))
	e := newBase64Encoder()
	run := func(name string, encode func(dst, src []byte) []byte) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				encode(out, data)
			}
		})
	}
	run("ours", e.append)
	run("standard", base64.StdEncoding.AppendEncode)
}
