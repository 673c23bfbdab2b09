package rpcjson

import (
	"encoding/base64"
	"encoding/binary"
)

// base64Encoder encodes a push, of which that is a good part of the work, in half
// the time of encoding/base64: it has the two characters for each value of 12 bits,
// the first one in the low byte (RFC 4648, section 4).
type base64Encoder [1 << 12]uint16

func newBase64Encoder() *base64Encoder {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	var e base64Encoder
	for i := range e {
		e[i] = uint16(alphabet[i>>6]) | uint16(alphabet[i&63])<<8
	}
	return &e
}

// append appends src as padded base64. It is fast as long as dst has room.
func (e *base64Encoder) append(dst, src []byte) []byte {
	for len(src) >= 8 && cap(dst)-len(dst) >= 8 {
		v := binary.BigEndian.Uint64(src)
		n := len(dst)
		dst = dst[:n+8]
		binary.LittleEndian.PutUint64(dst[n:], uint64(e[v>>52])|uint64(e[v>>40&0xfff])<<16|
			uint64(e[v>>28&0xfff])<<32|uint64(e[v>>16&0xfff])<<48)
		src = src[6:]
	}
	return base64.StdEncoding.AppendEncode(dst, src)
}
