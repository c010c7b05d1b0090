//! imgtool driver: Microsoft's VHDX format (MS-VHDX).
