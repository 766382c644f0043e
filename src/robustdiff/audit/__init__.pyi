from .result import AuditResult as AuditResult
from .result import Finding as Finding
