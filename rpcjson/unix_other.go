//go:build !linux

package rpcjson

import "syscall"

// ownerOnly does nothing here: the mode is set after the bind.
func ownerOnly(syscall.RawConn) error { return nil }
